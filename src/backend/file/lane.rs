//! One thread's way to a local source: what waits, and where.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, ioctl_blksszget, seek};
use rustix::io::{ReadWriteFlags, preadv2, pwritev2};

use super::{Direct, FileBackend, Medium};
use crate::backend::{Backend, Lane, Seek, Stat, Zero};
use crate::io::Io;
use crate::sys;

/// Zeroes are written in pieces of this length, in bytes.
const ZEROES_LEN: usize = 256 << 10;
/// One thread's way to a local source.
pub struct FileLane {
    pub(super) backend: Arc<FileBackend>,
    pub(super) io: Rc<Io>,
    /// For reads and writes, see [`FileBackend::for_one_thread`].
    pub(super) file: Arc<File>,
    /// The same for direct I/O.
    pub(super) direct_file: Option<Arc<File>>,
}

impl FileLane {
    /// What direct I/O needs, if that is asked for.
    fn direct(&self) -> Option<(&Direct, &Arc<File>)> {
        self.backend.direct.as_ref().zip(self.direct_file.as_ref())
    }

    /// Fills `buf` as far as the file goes, through the page cache of the source.
    async fn read_buffered(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let file = &self.file;
        let mut done = 0;
        let mut may_wait = false;
        while done < buf.len() {
            let rest = &mut buf[done..];
            let at = offset + done as u64;
            let read = match self.backend.medium {
                Medium::Memory => file.read_at(rest, at),
                Medium::Cached if may_wait => self.io.read_at(file, rest, at).await,
                Medium::Cached => read_at_nowait(file, rest, at),
            };
            match read {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if !may_wait && would_wait(&e) => may_wait = true,
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }

    /// Writes all of `data`, through the page cache of the source.
    async fn write_buffered(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let file = &self.file;
        let mut done = 0;
        let mut may_wait = false;
        while done < data.len() {
            let rest = &data[done..];
            let at = offset + done as u64;
            let written = match self.backend.medium {
                Medium::Memory => file.write_at(rest, at),
                Medium::Cached if may_wait => self.io.write_at(file, rest, at).await,
                Medium::Cached => write_at_nowait(file, rest, at),
            };
            match written {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if !may_wait && would_wait(&e) => may_wait = true,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    async fn read_direct(
        &self,
        file: &Arc<File>,
        direct: &Direct,
        offset: u64,
        buf: &mut [u8],
    ) -> io::Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            match self.io.read_at(file, &mut buf[done..], offset + done as u64).await {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if retry(&e) => {}
                Err(e) => return Err(e),
            }
            // A short read that ends inside a block is the end of the file.
            if !(done as u64).is_multiple_of(direct.offset_align) {
                break;
            }
        }
        Ok(done)
    }

    async fn write_direct(&self, file: &Arc<File>, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut done = 0;
        while done < data.len() {
            match self.io.write_at(file, &data[done..], offset + done as u64).await {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(e) if retry(&e) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// What does not fit direct I/O: through the page cache, and out of it again.
    async fn write_around(&self, direct: &Direct, offset: u64, data: &[u8]) -> io::Result<()> {
        let pages = Direct::pages(offset, data.len() as u64);
        let (start, len) = (pages.start, pages.end - pages.start);
        let _alone = direct.lock.exclusive(pages).await;
        self.write_buffered(offset, data).await?;
        // Not by the one that is flushed: it may find another write's error, which a flush must
        // find as well.
        let file = direct.file.clone();
        self.io.blocking(move || sys::write_out(&file, start, len)).await
    }

    /// `fallocate` on another thread: it may write.
    async fn fallocate(&self, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        let file = self.backend.file.clone();
        self.io.blocking(move || Ok(fallocate(&file, mode, offset, len)?)).await
    }

    /// tmpfs makes no zeroed ranges, but holes, which need no memory. A file of it has its space
    /// kept by reserving it again.
    async fn zero_memory(&self, offset: u64, len: u64, how: Zero) -> io::Result<()> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        self.fallocate(punch, offset, len).await?;
        if how == Zero::Keep && !self.backend.is_memory {
            self.fallocate(FallocateFlags::KEEP_SIZE, offset, len).await?;
        }
        Ok(())
    }

    /// Zeroes by writing them, piece by piece on another thread: through the page cache no piece
    /// would wait, and a long range would keep everybody else from this thread.
    async fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        let zeroes = Arc::new(vec![0; ZEROES_LEN.min(len as usize)]);
        let mut at = offset;
        while at < offset + len {
            let n = (zeroes.len() as u64).min(offset + len - at) as usize;
            if self.backend.direct.is_some() {
                self.write(at, &zeroes[..n], false).await?;
            } else {
                let (file, zeroes) = (self.file.clone(), zeroes.clone());
                self.io.blocking(move || file.write_all_at(&zeroes[..n], at)).await?;
            }
            at += n as u64;
        }
        Ok(())
    }
}

/// Reads at `offset` only what needs no waiting; `EAGAIN` otherwise, `EOPNOTSUPP` where the file
/// system cannot tell.
fn read_at_nowait(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut parts = [IoSliceMut::new(buf)];
    Ok(preadv2(file, &mut parts, offset, ReadWriteFlags::NOWAIT)?)
}

/// Writes at `offset` only what needs no waiting; errors as for [`read_at_nowait`].
fn write_at_nowait(file: &File, data: &[u8], offset: u64) -> io::Result<usize> {
    Ok(pwritev2(file, &[IoSlice::new(data)], offset, ReadWriteFlags::NOWAIT)?)
}

/// The file system would have to wait, or cannot tell.
fn would_wait(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EOPNOTSUPP))
}

/// Nothing is wrong with the request. A ring answers `EAGAIN` when memory for the I/O is short.
fn retry(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

impl Lane for FileLane {
    async fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        match self.direct() {
            Some((direct, file)) if direct.fits(offset, buf, self.backend.size()) => {
                self.read_direct(file, direct, offset, buf).await
            }
            _ => self.read_buffered(offset, buf).await,
        }
    }

    async fn write(&self, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        match self.direct() {
            Some((direct, file)) if direct.fits(offset, data, self.backend.size()) => {
                let pages = Direct::pages(offset, data.len() as u64);
                let _beside = direct.lock.shared(pages).await;
                self.write_direct(file, offset, data).await?;
            }
            Some((direct, _)) => self.write_around(direct, offset, data).await?,
            None => self.write_buffered(offset, data).await?,
        }
        self.backend.length.grow_to(offset + data.len() as u64);
        if durable {
            self.flush().await?;
        }
        Ok(())
    }

    async fn flush(&self) -> io::Result<()> {
        if self.backend.medium == Medium::Memory {
            return Ok(());
        }
        let backend = self.backend.clone();
        let sync = move || backend.unheard.note(backend.file.sync_data());
        self.backend.unheard.hear(self.io.blocking(sync).await)
    }

    async fn zero(&self, offset: u64, len: u64, how: Zero) -> io::Result<()> {
        if self.backend.medium == Medium::Memory {
            return self.zero_memory(offset, len, how).await;
        }
        let mode = match how {
            Zero::Punch => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            Zero::Keep => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        };
        let (mut start, mut end) = (offset, offset + len);
        if self.backend.is_device {
            // A device zeroes whole blocks only; the rest of the range is written.
            let block = u64::from(ioctl_blksszget(&self.backend.file)?);
            start = start.next_multiple_of(block);
            end = end / block * block;
            if start >= end {
                return self.write_zeroes(offset, len).await;
            }
        }
        match self.fallocate(mode, start, end - start).await {
            Err(e) if how == Zero::Keep && e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                return self.write_zeroes(offset, len).await;
            }
            result => result?,
        }
        self.write_zeroes(offset, start - offset).await?;
        self.write_zeroes(end, offset + len - end).await
    }

    async fn allocate(&self, offset: u64, len: u64, keep_size: bool) -> io::Result<()> {
        if self.backend.is_memory {
            // There is nothing to reserve: memory that is taken may be short for others, and is no
            // safer.
            let grows = !keep_size && offset + len > self.backend.size();
            return if grows { self.resize(offset + len).await } else { Ok(()) };
        }
        let mode = if keep_size { FallocateFlags::KEEP_SIZE } else { FallocateFlags::empty() };
        self.fallocate(mode, offset, len).await?;
        if !keep_size {
            self.backend.length.grow_to(offset + len);
        }
        Ok(())
    }

    async fn resize(&self, size: u64) -> io::Result<()> {
        let file = self.backend.file.clone();
        self.io.blocking(move || file.set_len(size)).await?;
        self.backend.length.set(size);
        Ok(())
    }

    async fn stat(&self) -> io::Result<Stat> {
        if self.backend.stat_from_memory {
            return self.backend.stat();
        }
        let backend = self.backend.clone();
        self.io.blocking(move || backend.stat()).await
    }

    async fn seek(&self, offset: u64, what: Seek) -> io::Result<u64> {
        let whence = match what {
            Seek::Data => SeekFrom::Data(offset),
            Seek::Hole => SeekFrom::Hole(offset),
        };
        // It waits for whoever changes the file's blocks, and for those that tell of them; in
        // memory it looks at every page.
        let file = self.backend.file.clone();
        match self.io.blocking(move || Ok(seek(&file, whence)?)).await {
            // Devices, and file systems that keep no account of holes: everything is data.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(match what {
                Seek::Data => offset,
                Seek::Hole => self.backend.size(),
            }),
            result => result,
        }
    }
}
