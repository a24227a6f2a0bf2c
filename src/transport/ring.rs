//! One io_uring, used by one thread: FUSE entries, backend I/O and wake-ups side by side.
//!
//! This is the only place that builds submission entries, and so the only one that hands memory to
//! the kernel. Two kinds of work are in flight, told apart by `user_data`:
//!
//! * a **FUSE entry** ([`Ring::register_entry`], [`Ring::commit`]): its memory is a slot's, owned
//!   by the kernel from the push until its completion is reaped;
//! * an **operation** ([`Operation`]): a future; its memory is borrowed by whoever awaits it, until
//!   its completion is reaped. Leaking it would end the borrow before that, so who begins a read or
//!   a write promises not to.
//!
//! Nothing here blocks except [`Ring::enter`] with `wait`.

#![allow(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue::Entry128};
use rustix::event::{EventfdFlags, eventfd};
use slab::Slab;

use crate::fuse::abi::{self, UringCmdReq};

/// The bits of `user_data` that tell what completed; the rest is an index.
const FUSE_ENTRY: u64 = 1 << 63;
/// An operation that moves data.
const IO: u64 = 1 << 62;

/// One io_uring with 128-byte entries and the operations in flight on it. Neither `Send` nor
/// `Sync`: `SINGLE_ISSUER` and `DEFER_TASKRUN` bind it to the thread that made it.
pub struct Ring {
    /// Entered by this thread only.
    uring: RefCell<IoUring<Entry128, cqueue::Entry>>,
    operations: RefCell<Slab<Progress>>,
    /// Reads and writes that the kernel has not completed.
    io_in_flight: Cell<usize>,
}

/// How far an [`Operation`] has come.
enum Progress {
    Waiting(Option<Waker>),
    Done(i32),
    /// Nobody awaits it any more, and it uses no memory.
    Abandoned,
}

impl Ring {
    /// A ring with room for `entries` submissions between two enters and four times as many
    /// completions. The kernel's reason when io_uring is not to be had: `EPERM` (forbidden by
    /// sysctl or seccomp), `ENOSYS` (not built in), `ENOMEM` (memlock limit).
    pub fn new(entries: u32) -> io::Result<Rc<Ring>> {
        let uring = IoUring::<Entry128, cqueue::Entry>::builder()
            .dontfork()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .setup_cqsize(entries.next_power_of_two() * 4)
            .build(entries.next_power_of_two())?;
        let ring = Ring {
            uring: RefCell::new(uring),
            operations: RefCell::new(Slab::new()),
            io_in_flight: Cell::new(0),
        };
        ring.probe()?;
        Ok(Rc::new(ring))
    }

    /// Sees one completion. A seccomp filter may allow the set-up and forbid the rest, and a ring
    /// that is promised to FUSE but cannot be entered would hang the mount.
    fn probe(&self) -> io::Result<()> {
        // SAFETY: it uses no memory.
        drop(unsafe { self.operation(opcode::Nop::new().build().into(), false) });
        self.enter(true)?;
        self.reap(|_, _| unreachable!("no FUSE entry is registered yet"));
        Ok(())
    }

    /// An eventfd that the kernel signals when there is something to [`reap`](Ring::reap) after an
    /// [`enter`](Ring::enter). (The ring's own descriptor does not do: under `DEFER_TASKRUN` it
    /// polls readable only for what was completed, and nothing completes before the enter.)
    pub fn completion_event(&self) -> io::Result<OwnedFd> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        self.uring.borrow().submitter().register_eventfd(event.as_raw_fd())?;
        Ok(event)
    }

    /// Whether entries were pushed that the kernel has not seen.
    pub fn has_unsubmitted(&self) -> bool {
        self.queued(&self.uring.borrow()) > 0
    }

    /// Whether an enter would complete something now: the kernel sets a flag in the shared ring
    /// (`IORING_SQ_TASKRUN`), so that polling needs no system call.
    pub fn has_work(&self) -> bool {
        let uring = self.uring.borrow();
        // SAFETY: `RefCell` says that nobody holds the queue mutably, and this thread is its only
        // user.
        unsafe { uring.submission_shared() }.taskrun()
    }

    /// Whether completions wait to be reaped.
    pub fn has_completions(&self) -> bool {
        !self.uring.borrow_mut().completion().is_empty()
    }

    /// Whether an operation is in flight.
    pub fn has_operations(&self) -> bool {
        !self.operations.borrow().is_empty()
    }

    /// How many reads and writes the kernel has not completed.
    pub fn io_in_flight(&self) -> usize {
        self.io_in_flight.get()
    }

    /// Submits what was pushed and runs the kernel's deferred work for this ring (without an enter
    /// that asks for events nothing completes under `DEFER_TASKRUN`). With `wait` it sleeps until
    /// there is a completion. `EINTR` is no error: the caller's loop comes round again.
    pub fn enter(&self, wait: bool) -> io::Result<()> {
        let uring = self.uring.borrow();
        // SAFETY: no argument is passed, and the entries in the queue were checked when they were
        // pushed.
        let entered = unsafe {
            const IORING_ENTER_GETEVENTS: u32 = 1;
            let submitted = self.queued(&uring);
            uring.submitter().enter::<libc::sigset_t>(
                submitted,
                u32::from(wait),
                IORING_ENTER_GETEVENTS,
                None,
            )
        };
        settle(entered)
    }

    /// As [`Ring::enter`] with `wait`, but sleeps no longer than `timeout`.
    pub fn enter_for(&self, timeout: Duration) -> io::Result<()> {
        let uring = self.uring.borrow();
        let timeout = Timespec::from(timeout);
        settle(uring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timeout)))
    }

    fn queued(&self, uring: &IoUring<Entry128, cqueue::Entry>) -> u32 {
        // SAFETY: `RefCell` says that nobody holds the queue mutably, and this thread is its only
        // user.
        unsafe { uring.submission_shared() }.len() as u32
    }

    /// Takes every completion that is there. FUSE entries go to `on_entry` as (index, result);
    /// those of operations wake whoever awaits them. Returns how many there were.
    pub fn reap(&self, mut on_entry: impl FnMut(u32, i32)) -> usize {
        let mut reaped = 0;
        loop {
            // One at a time: `on_entry` and the wakers may push to the ring.
            let Some(cqe) = self.uring.borrow_mut().completion().next() else { return reaped };
            reaped += 1;
            if cqe.user_data() & FUSE_ENTRY != 0 {
                on_entry((cqe.user_data() & !FUSE_ENTRY) as u32, cqe.result());
            } else {
                if cqe.user_data() & IO != 0 {
                    self.io_in_flight.set(self.io_in_flight.get() - 1);
                }
                self.complete((cqe.user_data() & !IO) as usize, cqe.result());
            }
        }
    }

    fn complete(&self, key: usize, result: i32) {
        let mut operations = self.operations.borrow_mut();
        match std::mem::replace(&mut operations[key], Progress::Done(result)) {
            Progress::Waiting(waker) => {
                drop(operations);
                waker.into_iter().for_each(Waker::wake);
            }
            Progress::Abandoned => drop(operations.remove(key)),
            Progress::Done(_) => unreachable!("an operation completes once"),
        }
    }

    /// Registers FUSE entry `index` of queue `qid` (`FUSE_IO_URING_CMD_REGISTER`).
    ///
    /// # Safety
    /// `iovecs` names the entry's header and payload. The two iovecs must live until the next
    /// enter, the memory they name until the entry's last completion, and nobody may use that
    /// memory before the entry completes.
    pub unsafe fn register_entry(
        &self,
        fuse: RawFd,
        qid: u16,
        index: u32,
        iovecs: *const [libc::iovec; 2],
    ) {
        let request = UringCmdReq { qid, ..UringCmdReq::default() };
        let entry = opcode::UringCmd80::new(Fd(fuse), abi::FUSE_IO_URING_CMD_REGISTER)
            .addr(Some(iovecs as u64))
            .cmd(request.to_command())
            .build();
        // SAFETY: the caller's promise is this function's own.
        unsafe { self.push(set_len(entry, 2).user_data(FUSE_ENTRY | u64::from(index))) };
    }

    /// Gives entry `index` back with its reply and asks for the next request
    /// (`FUSE_IO_URING_CMD_COMMIT_AND_FETCH`).
    ///
    /// # Safety
    /// The entry is ours: its last completion was reaped and no commit was pushed since; and nobody
    /// uses its memory from here until it completes again.
    pub unsafe fn commit(&self, fuse: RawFd, qid: u16, index: u32, commit_id: u64) {
        let request = UringCmdReq { qid, commit_id, ..UringCmdReq::default() };
        let entry = opcode::UringCmd80::new(Fd(fuse), abi::FUSE_IO_URING_CMD_COMMIT_AND_FETCH)
            .cmd(request.to_command())
            .build();
        // SAFETY: the caller's promise is this function's own.
        unsafe { self.push(entry.user_data(FUSE_ENTRY | u64::from(index))) };
    }

    /// Reads into `buf` at `offset`. The future must be polled to its end.
    ///
    /// # Safety
    /// The future is not leaked while `buf`'s borrow ends: the kernel writes until it has
    /// completed.
    pub unsafe fn read_at<'a>(
        &'a self,
        file: &'a impl AsRawFd,
        buf: &'a mut [u8],
        offset: u64,
    ) -> Operation<'a> {
        let entry = opcode::Read::new(Fd(file.as_raw_fd()), buf.as_mut_ptr(), clamp_len(buf.len()))
            .offset(offset)
            .build();
        // SAFETY: `Operation<'a>` borrows the file and the buffer until the completion: its `Drop`
        // sees to it, and the caller promises that it is not leaked.
        unsafe { self.operation(entry.into(), true) }
    }

    /// Writes `data` at `offset`. The future must be polled to its end.
    ///
    /// # Safety
    /// As for [`Ring::read_at`]: the kernel reads `data` until it has completed.
    pub unsafe fn write_at<'a>(
        &'a self,
        file: &'a impl AsRawFd,
        data: &'a [u8],
        offset: u64,
    ) -> Operation<'a> {
        let entry = opcode::Write::new(Fd(file.as_raw_fd()), data.as_ptr(), clamp_len(data.len()))
            .offset(offset)
            .build();
        // SAFETY: as in `read_at`.
        unsafe { self.operation(entry.into(), true) }
    }

    /// Completes when `fd` polls one of `events` (`POLLIN`, `POLLOUT`), an error or a hang-up. May
    /// be dropped.
    pub fn poll<'a>(&'a self, fd: &'a impl AsRawFd, events: libc::c_short) -> Operation<'a> {
        let entry = opcode::PollAdd::new(Fd(fd.as_raw_fd()), events as u32).build();
        // SAFETY: a poll uses no memory of ours; the kernel takes its own reference to the file.
        unsafe { self.operation(entry.into(), false) }
    }

    /// # Safety
    /// Memory that `entry` names must be borrowed for `'a`, and `owns_memory` must be set if there
    /// is any.
    unsafe fn operation<'a>(&'a self, entry: Entry128, owns_memory: bool) -> Operation<'a> {
        let key = self.operations.borrow_mut().insert(Progress::Waiting(None));
        let mut user_data = key as u64;
        if owns_memory {
            user_data |= IO;
            self.io_in_flight.set(self.io_in_flight.get() + 1);
        }
        // SAFETY: the caller's promise.
        unsafe { self.push(entry.user_data(user_data)) };
        Operation { ring: self, key: Some(key), owns_memory }
    }

    /// # Safety
    /// The memory that `entry` names must stay valid and unused until its completion is reaped.
    unsafe fn push(&self, entry: Entry128) {
        loop {
            // SAFETY: the caller's promise.
            if unsafe { self.uring.borrow_mut().submission().push(&entry) }.is_ok() {
                return;
            }
            // The submission queue is full: one enter empties it, since SUBMIT_ALL does not stop at
            // errors. Completions for which there is no room wait in the kernel.
            if let Err(e) = self.enter(false) {
                log::error!("io_uring_enter: {e}");
            }
        }
    }
}

/// An operation in flight: yields the completion's result.
pub struct Operation<'a> {
    ring: &'a Ring,
    /// Empty once the result was taken.
    key: Option<usize>,
    /// The kernel may still use memory that `'a` borrows.
    owns_memory: bool,
}

impl Future for Operation<'_> {
    type Output = io::Result<usize>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let key = self.key.expect("polled after completion");
        let mut operations = self.ring.operations.borrow_mut();
        match &mut operations[key] {
            Progress::Done(result) => {
                let result = *result;
                operations.remove(key);
                drop(operations);
                self.key = None;
                Poll::Ready(match result {
                    n if n >= 0 => Ok(n as usize),
                    errno => Err(io::Error::from_raw_os_error(-errno)),
                })
            }
            Progress::Waiting(waker) => {
                match waker {
                    Some(w) => w.clone_from(cx.waker()),
                    None => *waker = Some(cx.waker().clone()),
                }
                Poll::Pending
            }
            Progress::Abandoned => unreachable!("only a drop abandons an operation"),
        }
    }
}

impl Drop for Operation<'_> {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let mut operations = self.ring.operations.borrow_mut();
        if matches!(operations[key], Progress::Done(_)) {
            operations.remove(key);
        } else if self.owns_memory {
            // The buffer's borrow ends here, but the kernel's use of it does not. Handlers are
            // polled to their end, so this is a bug; going on could corrupt data without a trace.
            log::error!("an I/O operation was dropped in flight");
            std::process::abort();
        } else {
            operations[key] = Progress::Abandoned;
        }
    }
}

/// What an enter says that is no failure: the caller's loop comes round again. EBUSY: completions
/// must be reaped first, which it does next. EAGAIN: there is no memory for a request just now.
/// ETIME: the sleep is over.
fn settle(entered: io::Result<usize>) -> io::Result<()> {
    match entered {
        Ok(_) => Ok(()),
        Err(e) => match e.raw_os_error() {
            Some(libc::EINTR | libc::EBUSY | libc::EAGAIN | libc::ETIME) => Ok(()),
            _ => Err(e),
        },
    }
}

/// The kernel transfers at most `MAX_RW_COUNT` (2 GiB less a page) at once.
fn clamp_len(len: usize) -> u32 {
    len.min(0x7fff_f000) as u32
}

/// Sets `sqe.len`, for which the crate's `UringCmd80` has no setter.
fn set_len(mut entry: Entry128, len: u32) -> Entry128 {
    // include/uapi/linux/io_uring.h: struct io_uring_sqe, `len` follows opcode, flags, ioprio, fd,
    // off, addr.
    const LEN_OFFSET: usize = 24;
    const _: () = assert!(size_of::<Entry128>() == 128 && align_of::<Entry128>() >= 4);
    // SAFETY: `Entry128` is repr(C) and begins with the kernel's struct io_uring_sqe, so a u32 at
    // offset 24 lies inside it and is aligned.
    unsafe { (&raw mut entry).cast::<u32>().add(LEN_OFFSET / size_of::<u32>()).write(len) };
    entry
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};
    use std::fs::File;
    use std::io::Write;
    use std::pin::pin;
    use std::task::Waker;

    fn ring() -> Option<Rc<Ring>> {
        Ring::new(8).inspect_err(|e| println!("skipped: no io_uring here: {e}")).ok()
    }

    fn drive<F: Future>(ring: &Ring, future: F) -> F::Output {
        let mut future = pin!(future);
        loop {
            if let Poll::Ready(out) = future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
            {
                return out;
            }
            ring.enter(true).unwrap();
            ring.reap(|_, _| panic!("no FUSE entry here"));
        }
    }

    #[test]
    fn len_is_written_where_the_crate_itself_writes_it() {
        // SAFETY: both are 128 bytes of integers.
        let bytes = |entry: &Entry128| unsafe { (&raw const *entry).cast::<[u8; 128]>().read() };
        let read = |len| opcode::Read::new(Fd(3), std::ptr::null_mut(), len).build().into();
        assert_eq!(bytes(&set_len(read(0), 0x0102_0304)), bytes(&read(0x0102_0304)));
    }

    #[test]
    fn read_and_write_complete() {
        let Some(ring) = ring() else { return };
        let file = File::from(memfd_create("ring-test", MemfdFlags::CLOEXEC).unwrap());
        // SAFETY: it is polled to its end here, and so is the next one.
        let write = unsafe { ring.write_at(&file, b"hello", 100) };
        assert_eq!(drive(&ring, write).unwrap(), 5);
        let mut buf = [0; 8];
        // SAFETY: as above.
        let read = unsafe { ring.read_at(&file, &mut buf, 100) };
        assert_eq!(ring.io_in_flight(), 1);
        assert_eq!(drive(&ring, read).unwrap(), 5);
        assert_eq!(ring.io_in_flight(), 0);
        assert_eq!(&buf[..5], b"hello");
        assert!(!ring.has_operations());
    }

    #[test]
    fn more_operations_than_entries_all_complete() {
        let Some(ring) = ring() else { return };
        let file = File::from(memfd_create("ring-test", MemfdFlags::CLOEXEC).unwrap());
        (&file).write_all(&[7; 4096]).unwrap();
        let mut bufs = vec![[0u8; 16]; 40];
        // SAFETY: all are polled to their ends below.
        let read = |buf| unsafe { ring.read_at(&file, buf, 0) };
        let reads: Vec<_> = bufs.iter_mut().map(|buf| read(buf)).collect();
        for read in reads {
            assert_eq!(drive(&ring, read).unwrap(), 16);
        }
        assert!(bufs.iter().all(|b| b == &[7; 16]));
    }

    #[test]
    fn a_dropped_poll_frees_its_place_when_it_completes() {
        let Some(ring) = ring() else { return };
        let (a, mut b) = std::os::unix::net::UnixStream::pair().unwrap();
        drop(ring.poll(&a, libc::POLLIN));
        b.write_all(b"x").unwrap();
        while ring.has_operations() {
            ring.enter(true).unwrap();
            ring.reap(|_, _| {});
        }
    }
}
