//! A part of a source, as a source of its own: a partition, or a range of bytes.
//!
//! [`Part`] wraps a whole [`Backend`], and its lanes wrap the whole's: they shift offsets and bound
//! ranges, so that neither what is above nor what is below knows of it. Whole disks are not
//! wrapped, and have no cost.
//!
//! Nothing leaves the part, whatever is asked: what reaches past its end is refused here, behind
//! the checks of the export. Its size is fixed.

use std::fmt;
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use polling::Poller;

use super::{Backend, Capabilities, Lane, Outage, RemoteStats, Seek, Stat, Zero};
use crate::io::Io;

/// What `stat` counts in, in bytes.
const SECTOR: u64 = 512;

/// A part of a source.
#[derive(Debug)]
pub struct Part<B> {
    whole: Arc<B>,
    /// In the whole, in bytes. It was inside when the part was made.
    range: Range<u64>,
}

impl<B: Backend> Part<B> {
    /// The bytes of `whole` in `range`; `InvalidInput` where not all of them are there, or there
    /// are none.
    pub fn new(whole: Arc<B>, range: Range<u64>) -> io::Result<Arc<Part<B>>> {
        if range.is_empty() || range.end > whole.size() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Arc::new(Part { whole, range }))
    }

    /// What `stat` shows: programs look for holes only in a file that uses less than its length.
    fn stat_of(&self, whole: Stat) -> Stat {
        let allocated_bytes = match whole.allocated_bytes < self.whole.size() {
            true => whole.allocated_bytes.min((self.size() / SECTOR).saturating_sub(1) * SECTOR),
            false => self.size(),
        };
        Stat { allocated_bytes, ..whole }
    }
}

impl<B> fmt::Display for Part<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at {}", self.range.end - self.range.start, self.range.start)
    }
}

impl<B: Backend> Backend for Part<B> {
    type Lane = PartLane<B>;

    fn lane(self: &Arc<Self>, io: &Rc<Io>) -> io::Result<PartLane<B>> {
        Ok(PartLane { whole: self.whole.lane(io)?, part: self.clone() })
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { resizable: false, fixed_size: true, ..self.whole.capabilities() }
    }

    fn size(&self) -> u64 {
        self.range.end - self.range.start
    }

    fn read_at_start(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if self.size().checked_sub(offset).is_none_or(|left| left < buf.len() as u64) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.whole.read_at_start(self.range.start + offset, buf)
    }

    fn sector_bytes(&self) -> Option<u32> {
        self.whole.sector_bytes()
    }

    fn stat(&self) -> io::Result<Stat> {
        self.whole.stat().map(|whole| self.stat_of(whole))
    }

    fn set_read_ahead(&self, bytes: u64) {
        self.whole.set_read_ahead(bytes);
    }

    fn forget(&self) {
        self.whole.forget();
    }

    fn hurry(&self) {
        self.whole.hurry();
    }

    fn outage(&self) -> Option<Outage> {
        self.whole.outage()
    }

    fn set_control(&self, control: Arc<Poller>) {
        self.whole.set_control(control);
    }

    fn stats(&self) -> Option<RemoteStats> {
        self.whole.stats()
    }

    fn last_flush(&self, patience: Duration) -> io::Result<()> {
        self.whole.last_flush(patience)
    }
}

/// One thread's way to a part.
pub struct PartLane<B: Backend> {
    whole: B::Lane,
    part: Arc<Part<B>>,
}

impl<B: Backend> PartLane<B> {
    /// Where `len` bytes at `offset` are in the whole. `ENOSPC` if not all of them are in the part.
    fn place(&self, offset: u64, len: u64) -> io::Result<u64> {
        match offset.checked_add(len) {
            Some(end) if end <= self.part.size() => Ok(self.part.range.start + offset),
            _ => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
        }
    }

    /// Where a read that may reach past the end begins in the whole, and how many of its bytes are
    /// in the part.
    fn place_of_read(&self, offset: u64, len: usize) -> (u64, usize) {
        let offset = offset.min(self.part.size());
        let len = (self.part.size() - offset).min(len as u64) as usize;
        (self.part.range.start + offset, len)
    }
}

/// The part is whole, or a read is an error: its size is fixed, so what has been cut off is not an
/// end but a loss.
fn all_of(read: usize, len: usize) -> io::Result<usize> {
    if read < len {
        log::error!("the source was cut off: it ends before the end of the part that is served");
        return Err(io::Error::from_raw_os_error(libc::EIO));
    }
    Ok(read)
}

impl<B: Backend> Lane for PartLane<B> {
    async fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let (at, len) = self.place_of_read(offset, buf.len());
        all_of(self.whole.read(at, &mut buf[..len]).await?, len)
    }

    async fn read_cached(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let (at, len) = self.place_of_read(offset, buf.len());
        all_of(self.whole.read_cached(at, &mut buf[..len]).await?, len)
    }

    async fn write(&self, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        let at = self.place(offset, data.len() as u64)?;
        self.whole.write(at, data, durable).await
    }

    async fn flush(&self) -> io::Result<()> {
        self.whole.flush().await
    }

    async fn zero(&self, offset: u64, len: u64, how: Zero) -> io::Result<()> {
        let at = self.place(offset, len)?;
        self.whole.zero(at, len, how).await
    }

    async fn allocate(&self, offset: u64, len: u64, _keep_size: bool) -> io::Result<()> {
        let at = self.place(offset, len)?;
        self.whole.allocate(at, len, true).await
    }

    async fn resize(&self, _size: u64) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }

    async fn stat(&self) -> io::Result<Stat> {
        self.whole.stat().await.map(|whole| self.part.stat_of(whole))
    }

    async fn seek(&self, offset: u64, what: Seek) -> io::Result<u64> {
        let at = self.place(offset, 1).map_err(|_| io::Error::from_raw_os_error(libc::ENXIO))?;
        let found = self.whole.seek(at, what).await?;
        match what {
            Seek::Data if found >= self.part.range.end => {
                Err(io::Error::from_raw_os_error(libc::ENXIO))
            }
            Seek::Data | Seek::Hole => Ok(found.min(self.part.range.end) - self.part.range.start),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;

    use smol::LocalExecutor;

    use super::*;
    use crate::backend::file::FileBackend;

    const WHOLE: u64 = 64 << 10;
    const PART: Range<u64> = 5000..13_000;
    const LEN: u64 = PART.end - PART.start;

    /// A disk of ones, and a lane of a part of it. Memory never waits, so that no ring and no
    /// reactor is needed.
    fn part() -> (Arc<FileBackend>, PartLane<FileBackend>) {
        let whole = FileBackend::memory(WHOLE, false).unwrap();
        let io = Io::of_a_test(None, Rc::new(LocalExecutor::new()));
        let all = whole.lane(&io).unwrap();
        now(all.write(0, &vec![1; WHOLE as usize], false)).unwrap();
        let lane = Part::new(whole.clone(), PART).unwrap().lane(&io).unwrap();
        (whole, lane)
    }

    fn now<T>(work: impl Future<Output = T>) -> T {
        smol::block_on(work)
    }

    fn bytes(whole: &FileBackend) -> Vec<u8> {
        let mut bytes = vec![0; WHOLE as usize];
        whole.read_at_start(0, &mut bytes).unwrap();
        bytes
    }

    /// Of the bytes outside of the part all are as they were.
    fn assert_neighbours(whole: &FileBackend) {
        let bytes = bytes(whole);
        assert_eq!(whole.size(), WHOLE);
        let outside = (0..WHOLE).filter(|at| !PART.contains(at));
        assert!(outside.into_iter().all(|at| bytes[at as usize] == 1));
    }

    fn errno<T>(result: io::Result<T>) -> Option<i32> {
        result.err().and_then(|e| e.raw_os_error())
    }

    #[test]
    fn offsets_are_those_of_the_part() {
        let (whole, lane) = part();
        now(lane.write(0, b"first", false)).unwrap();
        now(lane.write(LEN - 4, b"last", true)).unwrap();
        assert_neighbours(&whole);
        let all = bytes(&whole);
        assert_eq!(&all[5000..5005], b"first");
        assert_eq!(&all[12_996..13_000], b"last");
        let mut buf = [0; 10];
        assert_eq!(now(lane.read(LEN - 4, &mut buf)).unwrap(), 4);
        assert_eq!(&buf[..4], b"last");
        assert_eq!(now(lane.read_cached(LEN, &mut buf)).unwrap(), 0);
        assert_eq!(now(lane.read(u64::MAX, &mut buf)).unwrap(), 0);
        lane.part.read_at_start(0, &mut buf[..5]).unwrap();
        assert_eq!(&buf[..5], b"first");
        assert!(lane.part.read_at_start(LEN - 4, &mut buf).is_err());
    }

    #[test]
    fn nothing_leaves_the_part() {
        let (whole, lane) = part();
        for (offset, len) in [(LEN - 1, 2), (LEN, 1), (0, LEN + 1), (u64::MAX, 2), (1 << 63, 1)] {
            let data = vec![7; len as usize];
            assert_eq!(errno(now(lane.write(offset, &data, false))), Some(libc::ENOSPC));
            for how in [Zero::Punch, Zero::Keep] {
                assert_eq!(errno(now(lane.zero(offset, len, how))), Some(libc::ENOSPC));
            }
            for keep_size in [false, true] {
                let allocated = now(lane.allocate(offset, len, keep_size));
                assert_eq!(errno(allocated), Some(libc::ENOSPC));
            }
        }
        for size in [0, LEN - 1, LEN + 1] {
            assert_eq!(errno(now(lane.resize(size))), Some(libc::EOPNOTSUPP));
        }
        assert!(bytes(&whole).iter().all(|byte| *byte == 1));
        now(lane.zero(0, LEN, Zero::Punch)).unwrap();
        now(lane.allocate(0, LEN, false)).unwrap();
        assert_neighbours(&whole);
        assert!(bytes(&whole)[5000..13_000].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn holes_are_those_inside() {
        const PAGE: u64 = 4096;
        let whole = FileBackend::memory(8 * PAGE, false).unwrap();
        let io = Io::of_a_test(None, Rc::new(LocalExecutor::new()));
        let all = whole.lane(&io).unwrap();
        // Data in pages 0, 3 and 6.
        for page in [0, 3, 6] {
            now(all.write(page * PAGE, &[1; PAGE as usize], false)).unwrap();
        }
        let lane = Part::new(whole.clone(), PAGE..6 * PAGE).unwrap().lane(&io).unwrap();
        assert_eq!(now(lane.seek(0, Seek::Hole)).unwrap(), 0);
        assert_eq!(now(lane.seek(0, Seek::Data)).unwrap(), 2 * PAGE);
        assert_eq!(now(lane.seek(2 * PAGE, Seek::Hole)).unwrap(), 3 * PAGE);
        assert_eq!(errno(now(lane.seek(3 * PAGE, Seek::Data))), Some(libc::ENXIO), "a neighbour's");
        let data = Part::new(whole, 3 * PAGE..4 * PAGE).unwrap().lane(&io).unwrap();
        assert_eq!(now(data.seek(0, Seek::Hole)).unwrap(), PAGE, "its end");
        let stat = now(lane.stat()).unwrap();
        assert!(stat.allocated_bytes < 5 * PAGE, "{stat:?}");
    }

    #[test]
    fn what_is_cut_off_is_an_error_and_no_end() {
        let (whole, lane) = part();
        let io = Io::of_a_test(None, Rc::new(LocalExecutor::new()));
        now(whole.lane(&io).unwrap().resize(PART.start + 100)).unwrap();
        assert_eq!(now(lane.read(0, &mut [0; 100])).unwrap(), 100);
        assert_eq!(errno(now(lane.read(0, &mut [0; 101]))), Some(libc::EIO));
        assert_eq!(lane.part.size(), LEN);
    }

    #[test]
    fn a_part_is_inside() {
        let whole = FileBackend::memory(WHOLE, false).unwrap();
        for range in [0..0, 1..1, WHOLE..WHOLE + 1, 0..WHOLE + 1] {
            assert!(Part::new(whole.clone(), range.clone()).is_err(), "{range:?}");
        }
        assert!(Part::new(whole, 0..WHOLE).is_ok());
    }
}
