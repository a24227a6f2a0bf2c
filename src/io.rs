//! How a serving thread does the I/O of its backend without blocking.
//!
//! One [`Io`] belongs to each serving thread. It stands on the thread's ring where there is one
//! (the FUSE queue's own over io_uring; a private one on the /dev/fuse path), and on the pool of
//! blocking threads and async-io's reactor where io_uring cannot be used. Lanes see no difference.
//!
//! # Buffers on loan
//! A future that reads or writes lends its buffer to the kernel, to a thread of the pool or to the
//! driver of a connection. Its end takes the buffer back: completed, or dropped. *Leaked*, which is
//! safe in Rust, it would leave the buffer on loan when the borrow ends. So whoever makes an [`Io`]
//! promises ([`Io::new`]) for all that is read and written with it, down to a lane's futures, that
//! none of them is leaked unless its buffer is too. The transports keep the promise by having a
//! request's memory in the same future as what is done with it.

#![allow(unsafe_code)]

use std::cell::OnceCell;
use std::fs::File;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::rc::Rc;
use std::sync::Arc;

use async_io::Async;
use smol::{LocalExecutor, Task};

use crate::pool;
use crate::transport::ring::Ring;

/// A serving thread's I/O. Not `Send`: it stays on its thread.
pub struct Io {
    engine: Engine,
    executor: Rc<LocalExecutor<'static>>,
}

enum Engine {
    /// The thread sleeps in this ring, and its loop submits and reaps.
    Ring(Rc<Ring>),
    /// The thread sleeps in async-io's reactor. A private ring is made when it is first needed, and
    /// a task reaps it; none where io_uring cannot be used.
    Reactor(OnceCell<Option<Rc<Ring>>>),
}

/// Room in a private ring between two submits, in entries.
const PRIVATE_ENTRIES: u32 = 128;

/// async-io starts a thread of its own when it is used first, and panics where there can be none.
/// That is found out here, before anything uses it.
pub fn start_reactor() -> io::Result<()> {
    std::thread::Builder::new().spawn(|| ())?.join().expect("it does nothing");
    async_io::block_on(async {});
    Ok(())
}

impl Io {
    /// For a thread that sleeps in `ring`, and whose loop submits to and reaps it; without one, for
    /// a thread that sleeps in async-io's reactor, and calls [`Io::submit`] before it does.
    ///
    /// # Safety
    /// No future that reads or writes a buffer with this, also through a lane that is made with it,
    /// is leaked while the buffer's borrow ends.
    pub unsafe fn new(ring: Option<Rc<Ring>>, executor: Rc<LocalExecutor<'static>>) -> Rc<Io> {
        let engine = match ring {
            Some(ring) => Engine::Ring(ring),
            None => Engine::Reactor(OnceCell::new()),
        };
        Rc::new(Io { engine, executor })
    }

    /// As [`Io::new`], for tests: they leak no future.
    #[cfg(test)]
    pub fn of_a_test(ring: Option<Rc<Ring>>, executor: Rc<LocalExecutor<'static>>) -> Rc<Io> {
        // SAFETY: see above.
        unsafe { Io::new(ring, executor) }
    }

    /// Whether its thread sleeps in a ring of its own, and serves a queue of the kernel's by it.
    pub fn sleeps_in_ring(&self) -> bool {
        matches!(self.engine, Engine::Ring(_))
    }

    fn ring(&self) -> Option<&Rc<Ring>> {
        match &self.engine {
            Engine::Ring(ring) => Some(ring),
            Engine::Reactor(private) => private.get_or_init(|| self.private_ring()).as_ref(),
        }
    }

    /// A ring of which async-io's reactor says when there is something to reap.
    fn private_ring(&self) -> Option<Rc<Ring>> {
        let make = || {
            let ring = Ring::new(PRIVATE_ENTRIES)?;
            let completions = Async::new_nonblocking(ring.completion_event()?)?;
            let reaped = ring.clone();
            let reaper = async move {
                let mut count = [0; 8];
                loop {
                    let woken =
                        completions.read_with(|fd| Ok(rustix::io::read(fd, &mut count)?)).await;
                    if let Err(e) = woken.and_then(|_| reaped.enter(false)) {
                        return log::error!("a worker's ring: {e}");
                    }
                    reaped.reap(|_, _| unreachable!("a private ring has no FUSE entries"));
                }
            };
            self.executor.spawn(reaper).detach();
            io::Result::Ok(ring)
        };
        make().inspect_err(|e| log::info!("no io_uring ({e}): blocking I/O goes to threads")).ok()
    }

    /// Submits what operations have asked of a private ring.
    pub fn submit(&self) {
        if let Engine::Reactor(private) = &self.engine
            && let Some(Some(ring)) = private.get()
            && ring.has_unsubmitted()
            && let Err(e) = ring.enter(false)
        {
            log::error!("io_uring_enter: {e}");
        }
    }

    /// Reads at `offset` without blocking the thread. May return fewer bytes than asked.
    /// The future must be polled to its end.
    pub async fn read_at(
        &self,
        file: &Arc<File>,
        buf: &mut [u8],
        offset: u64,
    ) -> io::Result<usize> {
        match self.ring() {
            // SAFETY: whoever made this `Io` promises that no future of it is leaked.
            Some(ring) => unsafe { ring.read_at(&**file, buf, offset) }.await,
            // SAFETY: as above.
            None => unsafe { pool::read_at(file, buf, offset) }.await,
        }
    }

    /// Writes at `offset` without blocking the thread. May write fewer bytes than asked.
    /// The future must be polled to its end.
    pub async fn write_at(&self, file: &Arc<File>, data: &[u8], offset: u64) -> io::Result<usize> {
        match self.ring() {
            // SAFETY: as in `read_at`.
            Some(ring) => unsafe { ring.write_at(&**file, data, offset) }.await,
            // SAFETY: as in `read_at`.
            None => unsafe { pool::write_at(file, data, offset) }.await,
        }
    }

    /// Runs `work`, which may block, on another thread.
    pub async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        pool::run(work).await
    }

    /// Runs a future on this thread beside the handlers. Dropping the task cancels it.
    pub fn spawn<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> Task<T> {
        self.executor.spawn(future)
    }

    /// Watches a non-blocking socket for readiness.
    pub fn watch<T: AsFd + AsRawFd>(&self, source: T) -> io::Result<Watched<T>> {
        Ok(match &self.engine {
            Engine::Ring(ring) => Watched::Ring(source, ring.clone()),
            Engine::Reactor(_) => Watched::Reactor(Async::new_nonblocking(source)?),
        })
    }
}

/// A non-blocking descriptor whose readiness can be awaited. Every future here may be dropped.
pub enum Watched<T: AsFd + AsRawFd> {
    /// Polled by the thread's ring.
    Ring(T, Rc<Ring>),
    /// Registered with async-io's reactor.
    Reactor(Async<T>),
}

impl<T: AsFd + AsRawFd> Watched<T> {
    /// The descriptor's owner; use it for the non-blocking calls themselves.
    pub fn get_ref(&self) -> &T {
        match self {
            Watched::Ring(source, _) => source,
            Watched::Reactor(source) => source.get_ref(),
        }
    }

    /// Waits until a read would not block (it may still fail).
    pub async fn readable(&self) -> io::Result<()> {
        match self {
            Watched::Ring(source, ring) => ring.poll(source, libc::POLLIN).await.map(drop),
            Watched::Reactor(source) => source.readable().await,
        }
    }

    /// Waits until a write would not block (it may still fail).
    pub async fn writable(&self) -> io::Result<()> {
        match self {
            Watched::Ring(source, ring) => ring.poll(source, libc::POLLOUT).await.map(drop),
            Watched::Reactor(source) => source.writable().await,
        }
    }
}
