//! Partition tables, GPT and MBR: what `--partition` looks for, and `--info` shows.
//!
//! They are read, never written. A table is what some disk says of itself, so nothing in it is
//! believed before it was checked, and what is read is bounded. What is checked, and how partitions
//! are numbered, is as in Linux (block/partitions), so that a number means the same here as in
//! `/dev/sda2`.
//!
//! A parser of our own: the crate `gpt` panics on a header that it does not expect, and reads as
//! many entries as that asks for; `mbrman` brings eleven more packages, one of them given up. Both
//! are made for changing tables.

use std::fmt;
use std::io;
use std::ops::Range;

use serde::Serialize;

use crate::backend::Backend;

mod gpt;
mod mbr;

/// What MBRs count in unless the disk has larger sectors.
const SECTOR: u64 = 512;
/// How many partitions a message names.
const NAMED: usize = 16;

/// A disk's partitions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Table {
    /// Of which kind.
    pub kind: Kind,
    /// What it counts in, in bytes.
    pub sector_size: u64,
    /// By number.
    pub partitions: Vec<Partition>,
}

/// The kind of a partition table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A GUID partition table.
    Gpt,
    /// A master boot record, perhaps with extended ones.
    Mbr,
}

/// One partition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Partition {
    /// As Linux counts them.
    pub number: u32,
    /// Its begin, in bytes.
    pub offset: u64,
    /// In bytes.
    pub size: u64,
    /// A GUID, or the byte of an MBR in hexadecimal.
    #[serde(rename = "type")]
    pub kind: String,
    /// Only a GPT has names.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// It is an MBR's extended one, which holds the logical ones and their tables.
    #[serde(skip)]
    pub is_extended: bool,
}

/// Which part of a disk is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// A partition of the disk's table.
    Partition(u32),
    /// A range, in bytes.
    Range {
        /// Where it begins.
        offset: u64,
        /// How long it is; none: up to the end.
        size: Option<u64>,
    },
}

/// A disk whose table is looked for.
trait Disk {
    /// In bytes.
    fn size(&self) -> u64;
    /// Fills `buf`; fails where the disk ends before.
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// What the disk itself counts in, in bytes, if that is known.
    fn sector(&self) -> Option<u64>;

    /// `len` bytes, if the disk has them.
    fn bytes(&self, offset: u64, len: usize) -> Result<Option<Vec<u8>>, String> {
        if self.size().checked_sub(offset).is_none_or(|left| left < len as u64) {
            return Ok(None);
        }
        let mut bytes = vec![0; len];
        let read = self.read(offset, &mut bytes);
        let fail = |e| format!("the partition table cannot be read, {len} bytes at {offset}: {e}");
        read.map(|()| Some(bytes)).map_err(fail)
    }
}

impl<B: Backend> Disk for B {
    fn size(&self) -> u64 {
        Backend::size(self)
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.read_at_start(offset, buf)
    }

    fn sector(&self) -> Option<u64> {
        self.sector_bytes().map(u64::from)
    }
}

/// Reads the table of a source, blocking; none if it has none. An error says why it cannot be read
/// or believed.
pub fn read<B: Backend>(source: &B) -> Result<Option<Table>, String> {
    read_disk(source)
}

/// The bytes of a source that are wanted, which are all there. An error names what there is.
pub fn find<B: Backend>(source: &B, wanted: Wanted) -> Result<Range<u64>, String> {
    find_on(source, wanted)
}

fn read_disk(disk: &impl Disk) -> Result<Option<Table>, String> {
    let Some(record) = mbr::read(disk)? else { return Ok(None) };
    if record.is_protective() {
        return gpt::read(disk).map(Some);
    }
    record.table(disk).map(Some)
}

fn find_on(disk: &impl Disk, wanted: Wanted) -> Result<Range<u64>, String> {
    let disk_size = disk.size();
    let has = Bytes(disk_size);
    match wanted {
        Wanted::Range { offset, size } => {
            let end = size.map_or(Some(disk_size), |size| offset.checked_add(size));
            // A table that cannot be read is no reason not to serve a range.
            let there = || match read_disk(disk) {
                Ok(Some(table)) => format!("; {table}"),
                Ok(None) | Err(_) => String::new(),
            };
            let at = Bytes(offset);
            match (end, size) {
                _ if offset >= disk_size => {
                    Err(format!("--offset {at} is not before its end, it has {has}{}", there()))
                }
                (Some(end), _) if end <= disk_size => Ok(offset..end),
                (_, size) => Err(format!(
                    "--size {} from {at} on reaches past its end, it has {has}{}",
                    Bytes(size.unwrap_or(0)),
                    there()
                )),
            }
        }
        Wanted::Partition(number) => {
            let table = read_disk(disk)?.ok_or(
                "it has no partition table, neither GPT nor MBR: use --offset and --size, or leave \
                 out --partition",
            )?;
            let mut numbers = table.partitions.iter();
            let Some(partition) = numbers.find(|partition| partition.number == number) else {
                return Err(format!("it has no partition {number}; {table}"));
            };
            if partition.is_extended {
                return Err(format!(
                    "partition {number} is an extended one, which holds the logical ones; {table}"
                ));
            }
            match partition.offset.checked_add(partition.size) {
                Some(end) if end <= disk_size => Ok(partition.offset..end),
                _ => Err(format!(
                    "partition {number} reaches past its end, it has {has} (is the image whole?); \
                     {table}"
                )),
            }
        }
    }
}

/// One line for people.
impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Gpt => "GPT",
            Kind::Mbr => "MBR",
        };
        if self.partitions.is_empty() {
            return write!(f, "its {kind} has no partitions");
        }
        write!(f, "its {kind} has")?;
        for (i, partition) in self.partitions.iter().take(NAMED).enumerate() {
            let comma = if i == 0 { "" } else { "," };
            let (size, offset) = (Bytes(partition.size), Bytes(partition.offset));
            write!(f, "{comma} {} ({size} at {offset})", partition.number)?;
        }
        match self.partitions.len().saturating_sub(NAMED) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// A number of bytes as the command line has it.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
        let fits = |shift: &u32| self.0 != 0 && self.0.is_multiple_of(1 << shift);
        match units.iter().find(|(shift, _)| fits(shift)) {
            Some((shift, unit)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{} bytes", self.0),
        }
    }
}

/// Little-endian numbers at `at`, which is inside.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests;
