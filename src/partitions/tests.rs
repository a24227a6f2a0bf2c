use super::*;

const MIB: u64 = 1 << 20;

/// A disk in memory.
struct Fake {
    bytes: Vec<u8>,
    sector: Option<u64>,
}

impl Disk for Fake {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.copy_from_slice(&self.bytes[offset as usize..][..buf.len()]);
        Ok(())
    }

    fn sector(&self) -> Option<u64> {
        self.sector
    }
}

impl Fake {
    fn new(size: u64) -> Fake {
        Fake { bytes: vec![0; size as usize], sector: None }
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.bytes[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    /// A record with these entries: type, first sector, sectors.
    fn record(mut self, at: u64, entries: &[(u8, u32, u32)]) -> Fake {
        for (i, (kind, start, sectors)) in entries.iter().enumerate() {
            let entry = at + 446 + 16 * i as u64;
            self.put(entry + 4, &[*kind]);
            self.put(entry + 8, &start.to_le_bytes());
            self.put(entry + 12, &sectors.to_le_bytes());
        }
        self.put(at + 510, &[0x55, 0xaa]);
        self
    }

    /// A GPT with these partitions, each with its first and last sector.
    fn gpt(size: u64, sector: u64, partitions: &[(u64, u64)]) -> Fake {
        let mut disk = Fake::new(size).record(0, &[(0xee, 1, u32::MAX)]);
        let mut array = vec![0; 128 * 128];
        for (entry, (first, last)) in array.chunks_mut(128).zip(partitions) {
            entry[..16].copy_from_slice(&std::array::from_fn::<u8, 16, _>(|i| i as u8 + 1));
            entry[32..40].copy_from_slice(&first.to_le_bytes());
            entry[40..48].copy_from_slice(&last.to_le_bytes());
            for (unit, place) in "röot\u{1b}".encode_utf16().zip(entry[56..].chunks_mut(2)) {
                place.copy_from_slice(&unit.to_le_bytes());
            }
        }
        let last = size / sector - 1;
        for (at, array_at) in [(1, 2), (last, last - 128 * 128 / sector)] {
            let mut header = [0; 92];
            header[..8].copy_from_slice(b"EFI PART");
            header[12..16].copy_from_slice(&92_u32.to_le_bytes());
            header[24..32].copy_from_slice(&u64::to_le_bytes(at));
            header[72..80].copy_from_slice(&u64::to_le_bytes(array_at));
            header[80..84].copy_from_slice(&128_u32.to_le_bytes());
            header[84..88].copy_from_slice(&128_u32.to_le_bytes());
            header[88..92].copy_from_slice(&crc32fast::hash(&array).to_le_bytes());
            disk.header(at * sector, header);
            disk.put(array_at * sector, &array);
        }
        disk
    }

    /// Puts a header there, with its checksum.
    fn header(&mut self, at: u64, mut header: [u8; 92]) {
        header[16..20].fill(0);
        let checksum = crc32fast::hash(&header);
        header[16..20].copy_from_slice(&checksum.to_le_bytes());
        self.put(at, &header);
    }
}

fn places(disk: &Fake) -> Vec<(u32, u64, u64)> {
    let table = read_disk(disk).unwrap().expect("there is a table");
    table.partitions.iter().map(|p| (p.number, p.offset, p.size)).collect()
}

#[test]
fn an_mbr_has_primary_and_logical_partitions() {
    let disk = Fake::new(8 * MIB)
        .record(0, &[(0x83, 2048, 2048), (0, 0, 0), (0x05, 4096, 8192), (0x0c, 12288, 2048)])
        .record(4096 * 512, &[(0x83, 1024, 1024), (0x05, 2048, 2048)])
        .record((4096 + 2048) * 512, &[(0x82, 1000, 1048)]);
    let kib = |n: u64| n * 1024;
    assert_eq!(
        places(&disk),
        [
            (1, MIB, MIB),
            (3, 2 * MIB, 4 * MIB),
            (4, 6 * MIB, MIB),
            (5, kib(2048 + 512), kib(512)),
            (6, kib(2048 + 1024 + 500), kib(524)),
        ]
    );
    let found = |number| find_on(&disk, Wanted::Partition(number));
    assert_eq!(found(4), Ok(6 * MIB..7 * MIB));
    assert_eq!(found(5), Ok(kib(2560)..kib(3072)));
    assert!(found(3).unwrap_err().contains("extended"), "{found:?}", found = found(3));
    let missing = found(2).unwrap_err();
    assert!(
        missing.contains("no partition 2") && missing.contains("5 (512K at 2560K)"),
        "{missing}"
    );
    let kinds: Vec<_> =
        read_disk(&disk).unwrap().unwrap().partitions.into_iter().map(|p| p.kind).collect();
    assert_eq!(kinds, ["0x83", "0x05", "0x0c", "0x83", "0x82"]);
}

#[test]
fn an_mbr_counts_in_the_disks_sectors() {
    let disk = Fake { sector: Some(4096), ..Fake::new(MIB) }.record(0, &[(0x83, 16, 32)]);
    assert_eq!(places(&disk), [(1, 16 * 4096, 32 * 4096)]);
}

#[test]
fn a_chain_of_records_ends() {
    // It leads in a circle, outside, and to its begin.
    for (next, logical) in [(2048, 2), (u32::MAX, 1), (0, 1)] {
        let disk = Fake::new(8 * MIB)
            .record(0, &[(0x05, 2048, 8192)])
            .record(2048 * 512, &[(0x83, 8, 8), (0x05, next, 8)])
            .record(4096 * 512, &[(0x83, 8, 8), (0x05, next, 8)]);
        assert_eq!(places(&disk).len(), 1 + logical, "{next}");
    }
}

#[test]
fn a_gpt_is_read_whatever_its_sectors() {
    for (sector, known) in [(512, None), (4096, None), (512, Some(4096)), (2048, Some(2048))] {
        let disk = Fake::gpt(4 * MIB, sector, &[(100, 199), (0, 0), (200, 209)]);
        let disk = Fake { sector: known, ..disk };
        let expected = [(1, 100, 100), (2, 0, 1), (3, 200, 10)];
        let expected = expected.map(|(number, first, n)| (number, first * sector, n * sector));
        assert_eq!(places(&disk), expected, "{sector}");
        let table = read_disk(&disk).unwrap().unwrap();
        assert_eq!((table.kind, table.sector_size), (Kind::Gpt, sector));
        assert_eq!(table.partitions[0].name, "röot?");
        assert_eq!(table.partitions[0].kind, "04030201-0605-0807-090A-0B0C0D0E0F10");
    }
}

#[test]
fn a_damaged_gpt_has_a_copy() {
    let whole = || Fake::gpt(4 * MIB, 512, &[(100, 199)]);
    let end = 4 * MIB - 512;
    // A header's mark, its place, its checksum, an entry.
    for damaged in [512, 512 + 24, 512 + 16, 1024 + 40] {
        let mut disk = whole();
        disk.bytes[damaged] ^= 1;
        assert_eq!(places(&disk), [(1, 51_200, 51_200)], "{damaged}");
        disk.bytes[end as usize] ^= 1;
        let error = read_disk(&disk).unwrap_err();
        assert!(error.contains("damaged"), "{error}");
        assert!(find_on(&disk, Wanted::Partition(1)).is_err());
        let range = Wanted::Range { offset: 512, size: Some(512) };
        assert_eq!(find_on(&disk, range), Ok(512..1024), "it needs no table");
    }
}

/// Headers that have the right checksums, and ask for too much.
#[test]
fn a_gpt_that_lies_is_refused() {
    let lies: [(usize, &[u8]); 6] = [
        (80, &u32::MAX.to_le_bytes()),
        (84, &u32::MAX.to_le_bytes()),
        (84, &0_u32.to_le_bytes()),
        (72, &u64::MAX.to_le_bytes()),
        (12, &u32::MAX.to_le_bytes()),
        (12, &8_u32.to_le_bytes()),
    ];
    for (at, lie) in lies {
        let mut disk = Fake::gpt(4 * MIB, 512, &[(100, 199)]);
        for place in [512, 4 * MIB - 512] {
            let mut header: [u8; 92] = disk.bytes[place as usize..][..92].try_into().unwrap();
            header[at..at + lie.len()].copy_from_slice(lie);
            disk.header(place, header);
        }
        assert!(read_disk(&disk).is_err(), "{at}: {lie:?}");
    }
    // Entries that end before they begin, or behind all numbers.
    let disk = Fake::gpt(4 * MIB, 512, &[(200, 100), (0, u64::MAX), (u64::MAX, u64::MAX)]);
    assert_eq!(places(&disk), []);
    let disk = Fake::gpt(4 * MIB, 512, &[(100, 1 << 40)]);
    let error = find_on(&disk, Wanted::Partition(1)).unwrap_err();
    assert!(error.contains("past its end, it has 4M"), "{error}");
}

#[test]
fn what_has_no_table_says_so() {
    let mut boot_sector = Fake::new(MIB).record(0, &[(0x83, 1, 1)]);
    boot_sector.bytes[446] = b'x';
    for disk in [Fake::new(0), Fake::new(511), Fake::new(MIB), boot_sector] {
        assert_eq!(read_disk(&disk), Ok(None));
        let error = find_on(&disk, Wanted::Partition(1)).unwrap_err();
        assert!(error.contains("no partition table"), "{error}");
    }
    let empty = Fake::new(MIB).record(0, &[]);
    let error = find_on(&empty, Wanted::Partition(1)).unwrap_err();
    assert!(error.contains("its MBR has no partitions"), "{error}");
}

#[test]
fn ranges_are_inside() {
    let disk = Fake::new(MIB).record(0, &[(0x83, 8, 8)]);
    let range = |offset, size| find_on(&disk, Wanted::Range { offset, size });
    assert_eq!(range(0, None), Ok(0..MIB));
    assert_eq!(range(5, None), Ok(5..MIB));
    assert_eq!(range(5, Some(7)), Ok(5..12));
    assert_eq!(range(MIB - 1, Some(1)), Ok(MIB - 1..MIB));
    for (offset, size) in
        [(MIB, None), (MIB, Some(1)), (u64::MAX, None), (1, Some(MIB)), (MIB - 1, Some(u64::MAX))]
    {
        let error = range(offset, size).unwrap_err();
        assert!(error.contains("it has 1M") && error.contains("1 (4K at 4K)"), "{error}");
    }
}
