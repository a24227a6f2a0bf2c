//! The master boot record: four entries in the first sector, and a chain of extended records behind
//! one of them.

use super::{Disk, Kind, Partition, SECTOR, Table, u32_at};

/// The type of the one entry that stands for a GPT.
const PROTECTIVE: u8 = 0xee;
/// Those of extended partitions: of DOS, Windows and Linux.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
/// The first logical partition's number.
const FIRST_LOGICAL: u32 = 5;
/// A chain of extended records is at most so long.
const MOST_RECORDS: usize = 256;
/// The part of a sector that is a record, in bytes.
const RECORD_BYTES: usize = 512;

/// One of a record's entries, in sectors.
#[derive(Clone, Copy)]
struct Entry {
    boot: u8,
    kind: u8,
    start: u64,
    sectors: u64,
}

impl Entry {
    fn is_used(self) -> bool {
        self.sectors > 0
    }

    fn is_extended(self) -> bool {
        EXTENDED.contains(&self.kind)
    }
}

/// The entries of a sector that is a record.
pub struct Record([Entry; 4]);

impl Record {
    fn parse(sector: &[u8]) -> Option<Record> {
        if sector[510..512] != [0x55, 0xaa] {
            return None;
        }
        let entries = [446, 462, 478, 494].map(|at| Entry {
            boot: sector[at],
            kind: sector[at + 4],
            start: u32_at(sector, at + 8).into(),
            sectors: u32_at(sector, at + 12).into(),
        });
        Some(Record(entries))
    }

    /// It says that the disk has a GPT.
    pub fn is_protective(&self) -> bool {
        self.0.iter().any(|entry| entry.kind == PROTECTIVE)
    }

    /// The table, with the logical partitions.
    pub fn table(&self, disk: &impl Disk) -> Result<Table, String> {
        let sector_size = disk.sector().unwrap_or(SECTOR);
        let mut partitions = Vec::new();
        for (number, entry) in (1..).zip(self.0).filter(|(_, entry)| entry.is_used()) {
            partitions.push(partition(number, entry.start, entry, sector_size));
        }
        let mut number = FIRST_LOGICAL;
        for extended in self.0.into_iter().filter(|e| e.is_used() && e.is_extended()) {
            for (start, entry) in logical(disk, extended.start, sector_size)? {
                partitions.push(partition(number, start, entry, sector_size));
                number += 1;
            }
        }
        Ok(Table { kind: Kind::Mbr, sector_size, partitions })
    }
}

fn partition(number: u32, start: u64, entry: Entry, sector_size: u64) -> Partition {
    // Sectors have 33 bits, and their size 32: it fits.
    Partition {
        number,
        offset: start * sector_size,
        size: entry.sectors * sector_size,
        kind: format!("0x{:02x}", entry.kind),
        name: String::new(),
        is_extended: entry.is_extended(),
    }
}

/// The first sector's record, if it is one: file systems end their first sector in the same way.
pub fn read(disk: &impl Disk) -> Result<Option<Record>, String> {
    let Some(sector) = disk.bytes(0, RECORD_BYTES)? else { return Ok(None) };
    let is_flag = |entry: &Entry| matches!(entry.boot, 0 | 0x80);
    Ok(Record::parse(&sector).filter(|record| record.0.iter().all(is_flag)))
}

/// The logical partitions in the extended one at `first`, with their starts. All in sectors.
fn logical(disk: &impl Disk, first: u64, sector_size: u64) -> Result<Vec<(u64, Entry)>, String> {
    let mut found = Vec::new();
    let mut seen = Vec::new();
    let mut at = first;
    while !seen.contains(&at) && seen.len() < MOST_RECORDS {
        seen.push(at);
        let sector = disk.bytes(at * sector_size, RECORD_BYTES)?;
        let Some(record) = sector.as_deref().and_then(Record::parse) else { break };
        // The others hold garbage at times.
        let [one, other, ..] = record.0;
        let mut entries = [one, other].into_iter().filter(|entry| entry.is_used());
        // A partition counts from its own record, and the next record from the first.
        let data = entries.clone().filter(|entry| !entry.is_extended());
        found.extend(data.map(|entry| (at + entry.start, entry)));
        let Some(next) = entries.find(|entry| entry.is_extended()) else { break };
        at = first + next.start;
    }
    Ok(found)
}
