//! Reads for the page cache that do not ask for what is known to be a hole.
//!
//! Disks are mostly sparse, and programs that know nothing of `SEEK_HOLE` read them from one end to
//! the other. So when reads go in order, and have come upon zeroes, the server is asked where its
//! holes are, beside the reads and a long way ahead, and those are not read but filled with zeroes.
//! It is not asked where there is data: many a server has to look through all of it for the answer,
//! which for an image in memory takes as long as sending it. Only for the page cache, whose readers
//! see what other hosts write at the next first open: what is known is younger than the last one
//! ([`Extents::forget_all`]), and never older than a second.

use std::cell::Cell;
use std::io;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use super::ahead::Source;
use super::blocks::Blocks;
use super::extents::Extents;
use crate::io::Io;

/// One lane's reads past the holes.
pub struct Sparse {
    blocks: Rc<Blocks>,
    extents: Arc<Extents>,
    /// Of the lane's thread. Weak: its tasks hold this.
    io: Weak<Io>,
    is_asking: Rc<Cell<bool>>,
    /// The last read ended in zeroes.
    in_zeroes: Cell<bool>,
}

/// So much of a read's end is looked at, in bytes.
const END: usize = 4096;

impl Sparse {
    /// Reads by `blocks` what `extents` does not know to be a hole.
    pub fn new(blocks: Rc<Blocks>, extents: Arc<Extents>, io: &Rc<Io>) -> Sparse {
        let (io, is_asking) = (Rc::downgrade(io), Rc::default());
        Sparse { blocks, extents, io, is_asking, in_zeroes: Cell::new(false) }
    }

    /// Asks beside the reads where the holes are from `at` on.
    fn ask(&self, at: u64) {
        let Some(io) = self.io.upgrade() else { return };
        if self.is_asking.replace(true) {
            return;
        }
        let (blocks, extents) = (self.blocks.clone(), self.extents.clone());
        let is_asking = self.is_asking.clone();
        let ask = async move {
            // Nobody has asked for it, so an error is nobody's. The next read tries again.
            if let Err(e) = blocks.commands().learn(at, &extents).await {
                log::debug!("holes from {at} on: {e}");
            }
            is_asking.set(false);
        };
        io.spawn(ask).detach();
    }
}

impl Source for Sparse {
    async fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if !self.blocks.commands().tells_holes() {
            return self.blocks.read(offset, buf).await;
        }
        let end = offset + buf.len() as u64;
        let look = self.extents.look(offset..end);
        if let Some(at) = look.ask_from.filter(|_| self.in_zeroes.get()) {
            self.ask(at);
        }
        let (before, rest) = buf.split_at_mut((look.read.start - offset) as usize);
        let (read, after) = rest.split_at_mut((look.read.end - look.read.start) as usize);
        before.fill(0);
        after.fill(0);
        self.blocks.read(look.read.start, read).await?;
        let tail = &buf[buf.len().saturating_sub(END)..];
        self.in_zeroes.set(tail.iter().all(|byte| *byte == 0));
        Ok(())
    }
}
