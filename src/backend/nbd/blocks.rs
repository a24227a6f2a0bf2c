//! Any byte range on a server whose blocks have a minimum size.
//!
//! A range is cut into a *head* and a *tail*, which fill only part of a block, and the whole blocks
//! in the *middle*. The middle goes to the server as it is; head and tail are bounced through a
//! block. A part of a block is written by reading the block, changing it and writing it back.
//! Meanwhile no other write may touch the block, or the older bytes would come back over the newer:
//! that is what the [`RangeLock`] is for, exclusive for such a block and shared for every other
//! write. It is common to all lanes. Each part holds one lock at a time, so nobody waits in a
//! circle.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use smol::future::zip;

use super::commands::Commands;
use crate::backend::Zero;
use crate::backend::range_lock::RangeLock;

/// Unaligned access over [`Commands`].
pub struct Blocks {
    commands: Commands,
    lock: Arc<RangeLock>,
}

/// The lengths of a range's parts, in bytes. A range inside one block, less than it, is all head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Parts {
    head: u64,
    middle: u64,
    tail: u64,
}

impl Parts {
    fn of(offset: u64, length: u64, block: u64) -> Parts {
        let to_boundary = (block - offset % block) % block;
        let head = to_boundary.min(length);
        let rest = length - head;
        let tail = rest % block;
        match (head, rest - tail) {
            (0, 0) => Parts { head: tail, middle: 0, tail: 0 },
            (head, middle) => Parts { head, middle, tail },
        }
    }
}

impl Blocks {
    /// Over `commands`; `lock` is that of all lanes.
    pub fn new(commands: Commands, lock: Arc<RangeLock>) -> Blocks {
        Blocks { commands, lock }
    }

    /// The aligned commands beneath.
    pub fn commands(&self) -> &Commands {
        &self.commands
    }

    fn parts(&self, offset: u64, length: u64) -> Parts {
        Parts::of(offset, length, self.commands.minimum())
    }

    /// Fills `buf` from `offset`.
    pub async fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if self.commands.minimum() == 1 {
            return self.commands.read(offset, buf).await;
        }
        let parts = self.parts(offset, buf.len() as u64);
        let (head, rest) = buf.split_at_mut(parts.head as usize);
        let (middle, tail) = rest.split_at_mut(parts.middle as usize);
        let at_middle = offset + parts.head;
        let ends =
            zip(self.read_part(offset, head), self.read_part(at_middle + parts.middle, tail));
        let ((head, tail), middle) = zip(ends, self.commands.read(at_middle, middle)).await;
        head.and(middle).and(tail)
    }

    async fn read_part(&self, offset: u64, part: &mut [u8]) -> io::Result<()> {
        if part.is_empty() {
            return Ok(());
        }
        let (block, within) = self.block(offset, part.len());
        part.copy_from_slice(&self.read_block(block.start).await?[within]);
        Ok(())
    }

    /// Writes `data` at `offset`; `fua` as for [`Commands::write`].
    pub async fn write(&self, offset: u64, data: &[u8], fua: bool) -> io::Result<()> {
        if self.commands.minimum() == 1 {
            return self.commands.write(offset, data, fua).await;
        }
        let parts = self.parts(offset, data.len() as u64);
        let (head, rest) = data.split_at(parts.head as usize);
        let (middle, tail) = rest.split_at(parts.middle as usize);
        let at_middle = offset + parts.head;
        let ends = zip(
            self.change_part(offset, head.len(), fua, |part| part.copy_from_slice(head)),
            self.change_part(at_middle + parts.middle, tail.len(), fua, |part| {
                part.copy_from_slice(tail);
            }),
        );
        let ((head, tail), middle) = zip(ends, self.write_blocks(at_middle, middle, fua)).await;
        head?;
        tail?;
        middle
    }

    async fn write_blocks(&self, offset: u64, data: &[u8], fua: bool) -> io::Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        let _shared = self.lock.shared(offset..offset + data.len() as u64).await;
        self.commands.write(offset, data, fua).await
    }

    /// Makes the range read as zeroes. `EOPNOTSUPP` as for [`Commands::zero`], and then nothing is
    /// changed.
    pub async fn zero(&self, offset: u64, length: u64, how: Zero) -> io::Result<()> {
        if self.commands.minimum() == 1 {
            return self.commands.zero(offset, length, how).await;
        }
        let parts = self.parts(offset, length);
        let at_middle = offset + parts.head;
        let at_tail = at_middle + parts.middle;
        // First what may be unsupported.
        if parts.middle > 0 {
            let _shared = self.lock.shared(at_middle..at_tail).await;
            self.commands.zero(at_middle, parts.middle, how).await?;
        } else if how == Zero::Punch && !self.commands.has_write_zeroes() {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        let zero = |part: &mut [u8]| part.fill(0);
        let (head, tail) = zip(
            self.change_part(offset, parts.head as usize, false, zero),
            self.change_part(at_tail, parts.tail as usize, false, zero),
        )
        .await;
        head.and(tail)
    }

    /// Read-modify-write of a part of one block.
    async fn change_part(
        &self,
        offset: u64,
        length: usize,
        fua: bool,
        change: impl FnOnce(&mut [u8]),
    ) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        let (block, within) = self.block(offset, length);
        let _exclusive = self.lock.exclusive(block.clone()).await;
        let mut bytes = self.read_block(block.start).await?;
        change(&mut bytes[within]);
        self.commands.write(block.start, &bytes, fua).await
    }

    async fn read_block(&self, offset: u64) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.commands.minimum() as usize];
        self.commands.read(offset, &mut bytes).await?;
        Ok(bytes)
    }

    /// The block around a part of it, and where the part lies in it.
    fn block(&self, offset: u64, length: usize) -> (Range<u64>, Range<usize>) {
        let block = self.commands.minimum();
        let within = (offset % block) as usize;
        (offset - offset % block..offset - offset % block + block, within..within + length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_ranges() {
        for (offset, length, expected) in [
            (0, 4096, (0, 4096, 0)),
            (0, 1, (1, 0, 0)),
            (4095, 1, (1, 0, 0)),
            (4095, 2, (1, 0, 1)),
            (100, 200, (200, 0, 0)),
            (100, 3996, (3996, 0, 0)),
            (100, 3997, (3996, 0, 1)),
            (4096, 10000, (0, 8192, 1808)),
            (1, 12287, (4095, 8192, 0)),
            (1, 12288, (4095, 8192, 1)),
        ] {
            let (head, middle, tail) = expected;
            assert_eq!(
                Parts::of(offset, length, 4096),
                Parts { head, middle, tail },
                "{offset}+{length}"
            );
        }
    }
}
