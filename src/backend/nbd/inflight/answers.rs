//! What a server answers, piece by piece: for the receiving half, [`super::super::replies`]. An
//! error ends the connection, see [`super`].

use std::task::Waker;

use super::state::Step;
use super::{Buffer, Cause, Cookie, Extent, MAX_EXTENTS, SHUTTING_DOWN, Table, is_direct, weight};
use crate::backend::nbd::wire::{self, Command, Violation};

impl Table {
    /// Whether a large payload may come next, so that little should be read ahead of it.
    pub fn awaits_direct_read(&self) -> bool {
        self.direct_reads > 0
    }

    /// Whether `cookie` awaits data.
    pub fn is_read(&mut self, cookie: Cookie) -> Result<bool, Violation> {
        Ok(self.awaiting(cookie)?.command == Command::Read)
    }

    /// The offset and the length that were asked for, in bytes.
    pub fn range(&mut self, cookie: Cookie) -> Result<(u64, u64), Violation> {
        let entry = self.awaiting(cookie)?;
        Ok((entry.offset, entry.length))
    }

    /// Data for `offset..offset + length` of the export arrives next. `None`: it must be drained,
    /// and the read will fail. Otherwise its place in the buffer.
    ///
    /// More than was asked for is not waited for: every answer behind it would have to wait too,
    /// and a chunk may claim up to 2⁶⁴ bytes.
    pub fn begin_data(
        &mut self,
        cookie: Cookie,
        offset: u64,
        length: u64,
    ) -> Result<Option<u64>, Violation> {
        let entry = self.awaiting(cookie)?;
        if entry.command != Command::Read {
            return Err("data arrives for a request that is no READ".into());
        }
        if length > entry.length {
            let asked = entry.length;
            return Err(format!("a chunk claims {length} bytes of a READ of {asked}").into());
        }
        let at = offset.checked_sub(entry.offset);
        let end = at.and_then(|at| at.checked_add(length)).filter(|end| *end <= entry.length);
        match (at, end) {
            (Some(at), Some(end)) if entry.coverage.add(at..end) => Ok(Some(at)),
            (Some(_), Some(_)) => {
                entry.fault("tells the same bytes twice");
                Ok(None)
            }
            _ => {
                entry.fault("lies outside of it");
                Ok(None)
            }
        }
    }

    /// The caller's buffer from `at` on; `None` if the caller has gone.
    pub fn destination(&mut self, cookie: Cookie, at: u64, length: u64) -> Option<&mut [u8]> {
        let Buffer::Fill(lent) = &mut self.entry(cookie)?.buffer else { return None };
        // SAFETY: what is to be filled was made by `to_fill`.
        let buf = unsafe { lent.as_mut_slice() };
        buf.get_mut(at as usize..)?.get_mut(..length as usize)
    }

    /// As [`Table::begin_data`], for zeroes that are not on the wire.
    pub fn hole(&mut self, cookie: Cookie, offset: u64, length: u64) -> Result<(), Violation> {
        if length == 0 {
            return Err("a hole has no length".into());
        }
        if let Some(at) = self.begin_data(cookie, offset, length)?
            && let Some(buf) = self.destination(cookie, at, length)
        {
            buf.fill(0);
        }
        Ok(())
    }

    /// An extent of a BLOCK_STATUS, in order.
    pub fn extent(&mut self, cookie: Cookie, extent: Extent) -> Result<(), Violation> {
        let entry = self.awaiting(cookie)?;
        if entry.command != Command::BlockStatus {
            return Err("extents arrive for a request that is no BLOCK_STATUS".into());
        }
        if extent.length == 0 {
            entry.fault("has an extent without length");
            return Ok(());
        }
        let full = entry.extents.len() == MAX_EXTENTS;
        match entry.extents.last_mut() {
            // Not even a longer last extent: others may have been left out before.
            Some(_) if full => {}
            Some(last) if last.zero == extent.zero => {
                last.length = last.length.saturating_add(extent.length);
            }
            _ => entry.extents.push(extent),
        }
        Ok(())
    }

    /// The server reports an error; the reply may go on. One that is about to end has not done what
    /// was asked, and waits for its clients to leave: the connection is of no more use.
    pub fn error(&mut self, cookie: Cookie, error: u32) -> Result<(), Violation> {
        let entry = self.awaiting(cookie)?;
        if error == wire::SHUTTING_DOWN {
            return Err(SHUTTING_DOWN.into());
        }
        entry.fail(wire::errno(error));
        Ok(())
    }

    /// The reply is complete: checks that it was, and wakes the caller.
    pub fn complete(&mut self, cookie: Cookie, wakers: &mut Vec<Waker>) -> Result<(), Violation> {
        let entry = self.awaiting(cookie)?;
        if entry.failure.is_none() {
            if let Buffer::Send(_) | Buffer::SendCopy(_) = entry.buffer {
                entry.fault("comes before all of its data was sent");
            } else if entry.command == Command::Read && !entry.coverage.is_full(entry.length) {
                entry.fault("leaves bytes out");
            } else if entry.command == Command::BlockStatus && entry.extents.is_empty() {
                entry.fault("has no extents");
            }
        }
        if let (Some(abandoned), Some(Cause::Errno(_))) = (&entry.abandoned, &entry.failure) {
            abandoned.failed();
        }
        wakers.extend(entry.waker.take());
        let (work, direct) = (weight(entry.command, entry.length), is_direct(entry));
        self.answered += work;
        self.direct_reads -= usize::from(direct);
        self.step(cookie, Step::Replied);
        Ok(())
    }
}
