//! The GUID partition table: a header and an array of entries behind the first sector, and a copy
//! of both at the end.

use super::{Disk, Kind, Partition, SECTOR, Table, u32_at, u64_at};

/// The sectors of large disks, in bytes.
const LARGE_SECTOR: u64 = 4096;
/// The part of a header that is known, and the least length of an entry, in bytes.
const HEADER_BYTES: usize = 92;
const ENTRY_BYTES: usize = 128;
/// An array of entries is 16 KiB long, and seldom more; so much is read at most, in bytes.
const MOST_ENTRY_BYTES: usize = 1 << 20;

/// The table of a disk that has said that it has one.
pub fn read(disk: &impl Disk) -> Result<Table, String> {
    let mut sectors = vec![SECTOR, LARGE_SECTOR];
    // A copy of a disk may have kept what the disk counted in; checksums tell.
    if let Some(sector) = disk.sector().filter(|sector| *sector >= SECTOR) {
        sectors.retain(|other| *other != sector);
        sectors.insert(0, sector);
    }
    for &sector in &sectors {
        if let Some(table) = read_at(disk, sector, 1)? {
            return Ok(table);
        }
    }
    for &sector in &sectors {
        let last = (disk.size() / sector).saturating_sub(1);
        if let Some(table) = read_at(disk, sector, last)? {
            log::warn!("the GPT at the begin of the disk is damaged: its copy at the end is used");
            return Ok(table);
        }
    }
    Err("its MBR says that it has a GPT, but that is damaged at its begin and at its end \
         (sgdisk --verify says more): use --offset and --size"
        .into())
}

/// The table whose header is in the sector `at`, if one is there and is whole.
fn read_at(disk: &impl Disk, sector: u64, at: u64) -> Result<Option<Table>, String> {
    let Some(place) = at.checked_mul(sector) else { return Ok(None) };
    let Some(mut header) = disk.bytes(place, sector as usize)? else { return Ok(None) };
    let header_bytes = u32_at(&header, 12) as usize;
    if header[..8] != *b"EFI PART" || !(HEADER_BYTES..=header.len()).contains(&header_bytes) {
        return Ok(None);
    }
    let checksum = u32_at(&header, 16);
    header[16..20].fill(0);
    if crc32fast::hash(&header[..header_bytes]) != checksum || u64_at(&header, 24) != at {
        return Ok(None);
    }
    let (count, entry_bytes) = (u32_at(&header, 80) as usize, u32_at(&header, 84) as usize);
    let array_bytes = count.checked_mul(entry_bytes).filter(|bytes| *bytes <= MOST_ENTRY_BYTES);
    let place = u64_at(&header, 72).checked_mul(sector);
    let (Some(array_bytes), Some(place)) = (array_bytes, place) else { return Ok(None) };
    if entry_bytes < ENTRY_BYTES {
        return Ok(None);
    }
    let Some(array) = disk.bytes(place, array_bytes)? else { return Ok(None) };
    if crc32fast::hash(&array) != u32_at(&header, 88) {
        return Ok(None);
    }
    let entries = (1..).zip(array.chunks_exact(entry_bytes));
    let partitions = entries.filter_map(|(number, entry)| partition(number, entry, sector));
    Ok(Some(Table { kind: Kind::Gpt, sector_size: sector, partitions: partitions.collect() }))
}

/// None if the entry is not used, or makes no sense.
fn partition(number: u32, entry: &[u8], sector: u64) -> Option<Partition> {
    let kind: &[u8; 16] = entry[..16].try_into().ok()?;
    let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
    if *kind == [0; 16] {
        return None;
    }
    let sectors = last.checked_sub(first)?.checked_add(1)?;
    let units = entry[56..128].chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
    let name: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
    Some(Partition {
        number,
        offset: first.checked_mul(sector)?,
        size: sectors.checked_mul(sector)?,
        kind: guid(kind),
        // It may be printed on a terminal.
        name: String::from_utf16_lossy(&name).replace(char::is_control, "?"),
        is_extended: false,
    })
}

/// As people write it: three little-endian numbers, and bytes.
fn guid(bytes: &[u8; 16]) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02X}")).collect::<String>();
    let reversed = |bytes: &[u8]| hex(&bytes.iter().rev().copied().collect::<Vec<u8>>());
    let [a, b, c] = [&bytes[..4], &bytes[4..6], &bytes[6..8]].map(reversed);
    format!("{a}-{b}-{c}-{}-{}", hex(&bytes[8..10]), hex(&bytes[10..]))
}
