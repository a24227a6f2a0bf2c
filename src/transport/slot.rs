//! The memory of requests, and [`Slot`], the token for one of them.
//!
//! Who has a slot's memory: *kernel → transport → handler → transport → kernel*. It is always
//! exactly one of them. A request reaches the handler as a `Slot`; answering consumes it, so that a
//! second answer does not compile, and one that is dropped unanswered answers EIO and logs.
//!
//! Memory comes from an `Arena`: one mapping per serving thread, made at start, cut into pieces of
//! a head and a payload. Its pages become resident when they are first used. The payload is
//! page-aligned, so that a backend's direct I/O can use it, and data is never moved:
//!
//! ```text
//!            head (4096)                        payload (1 MiB)
//! /dev/fuse  ............| in header | args 40 | WRITE data / READ data / reply
//!                                 | out header | ^ page boundary
//! io_uring   in_out | op_in | ring_ent | ......| WRITE data / READ data / reply
//! ```

#![allow(unsafe_code)]

use std::io;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::errno::Errno;
use crate::fuse::abi::{InHeader, Plain};
use crate::fuse::request::Op;

/// The most that a READ asks for or a WRITE brings, in bytes: `max_write` of the INIT reply.
pub const PAYLOAD_LEN: usize = 1 << 20;
/// The head of a slot's memory, in bytes.
pub const HEAD_LEN: usize = 4096;
const STRIDE: usize = HEAD_LEN + PAYLOAD_LEN;
/// Payload pages up to here stay resident when a burst is over, in bytes.
const KEPT_LEN: usize = 64 << 10;
/// A burst is over when nothing has come for so long: a script that runs one program after another
/// on the file does not pay for the pages each time.
pub const BURST_OVER: Duration = Duration::from_secs(10);

/// One mapping, cut into [`Memory`]s.
struct Arena {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: an arena is an address and a length, and gives no access to what is there but by its
// `Memory`s.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    fn new(count: usize) -> io::Result<Arena> {
        let len = count * STRIDE;
        // SAFETY: a new anonymous mapping touches no memory of ours. NORESERVE: most of it is never
        // used.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).expect("mmap does not return null unasked");
        let arena = Arena { base, len };
        // SAFETY: the range is the mapping just made. Huge pages would make a 4 KiB request
        // resident as 2 MiB; a kernel without them says EINVAL, which is as good.
        unsafe { libc::madvise(arena.base.as_ptr().cast(), len, libc::MADV_NOHUGEPAGE) };
        Ok(arena)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and every `Memory` in it is gone: each holds an `Rc` of the
        // arena.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// The memory of one slot: the only owner of its piece of the arena.
///
/// A pointer, since it is moved several times for each request.
pub struct Memory(Box<Piece>);

struct Piece {
    head: NonNull<u8>,
    queue: u16,
    /// It stays with its thread.
    kept: bool,
    /// How much of the payload may be resident, in bytes.
    touched: usize,
    /// When the request in it arrived.
    arrived: Instant,
    /// Mapped as long as any of its pieces is left.
    _arena: Arc<Arena>,
}

// SAFETY: it is the only owner of plain bytes.
unsafe impl Send for Piece {}

impl Memory {
    /// Makes one for each of `queues`, which may repeat. Fails with `ENOMEM` when address space
    /// runs out, or memory may not be promised that is not there (vm.overcommit_memory).
    pub fn allocate(queues: &[u16]) -> io::Result<Vec<Memory>> {
        let arena = Arc::new(Arena::new(queues.len())?);
        let now = Instant::now();
        Ok(queues
            .iter()
            .enumerate()
            .map(|(i, &queue)| {
                // SAFETY: the arena is as many strides long, and each stride goes to one `Memory`.
                let head = unsafe { arena.base.add(i * STRIDE) };
                Memory(Box::new(Piece {
                    head,
                    queue,
                    kept: false,
                    touched: 0,
                    arrived: now,
                    _arena: arena.clone(),
                }))
            })
            .collect())
    }

    /// The kernel's queue that it belongs to.
    pub fn queue(&self) -> u16 {
        self.0.queue
    }

    /// A request has arrived in it.
    pub fn has_arrived(&mut self, at: Instant) {
        self.0.arrived = at;
    }

    /// Keeps it with the thread that it is registered by.
    pub fn keep(&mut self) {
        self.0.kept = true;
    }

    /// Whether it stays with the thread that it is registered by.
    pub fn is_kept(&self) -> bool {
        self.0.kept
    }

    /// Head and payload together.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the stride is mapped while the arena lives, initialised (to zero), and ours
        // alone.
        unsafe { std::slice::from_raw_parts(self.0.head.as_ptr(), STRIDE) }
    }

    /// Head and payload together.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `&mut self` makes the borrow exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.0.head.as_ptr(), STRIDE) }
    }

    /// The head and the payload as the kernel's `iovec`s, for a ring entry of `head_len` bytes of
    /// header.
    pub fn iovecs(&mut self, head_len: usize) -> [libc::iovec; 2] {
        let (head, payload) = self.bytes_mut().split_at_mut(HEAD_LEN);
        [
            libc::iovec { iov_base: head.as_mut_ptr().cast(), iov_len: head_len },
            libc::iovec { iov_base: payload.as_mut_ptr().cast(), iov_len: payload.len() },
        ]
    }

    /// Notes that the first `len` bytes of the payload were used.
    pub fn touch(&mut self, len: usize) {
        self.0.touched = self.0.touched.max(len.min(PAYLOAD_LEN));
    }

    /// Whether a large request has left pages here.
    pub fn has_burst_pages(&self) -> bool {
        self.0.touched > KEPT_LEN
    }

    /// Gives back the pages that a burst of large requests left. Their content is lost.
    pub fn release(&mut self) {
        if !self.has_burst_pages() {
            return;
        }
        const TAIL: std::ops::Range<usize> = HEAD_LEN + KEPT_LEN..STRIDE;
        // SAFETY: the pages are ours, anonymous and private: they read as zeroes from now on, which
        // is as initialised as before. There is no reference to them, and none is made: the kernel
        // may have the entry.
        let done = unsafe {
            let tail = self.0.head.add(TAIL.start);
            libc::madvise(tail.as_ptr().cast(), TAIL.len(), libc::MADV_DONTNEED)
        };
        // Only a locked or a wrong range is refused (madvise(2)), and this process locks no memory.
        assert_eq!(done, 0, "madvise: {}", io::Error::last_os_error());
        self.0.touched = KEPT_LEN;
    }

    /// A 40-byte structure and its like at `offset` of the head.
    pub fn head_struct<T: Plain>(&self, offset: usize) -> T {
        T::read(&self.bytes()[offset..HEAD_LEN])
    }

    /// Puts a structure at `offset` of the head.
    pub fn put_head_struct<T: Plain>(&mut self, offset: usize, value: &T) {
        self.bytes_mut()[offset..offset + size_of::<T>()].copy_from_slice(value.as_bytes());
    }
}

/// Takes a request's reply, and its memory with it: a transport.
pub trait ReplySink {
    /// Answers request `unique` with so many bytes of the payload, or an error.
    fn answer(&self, memory: Memory, unique: u64, result: Result<usize, Errno>);
    /// Takes the memory back; the request has no answer.
    fn discard(&self, memory: Memory);
}

/// One request, to be answered once.
pub struct Slot {
    /// Empty once answered.
    memory: Option<Memory>,
    header: InHeader,
    /// Where the arguments begin in the memory, and how many bytes there are.
    args: (usize, usize),
    sink: Rc<dyn ReplySink>,
}

impl Slot {
    /// A request that has arrived in `memory`, with `args_len` bytes of arguments at `args_offset`.
    pub fn new(
        mut memory: Memory,
        header: InHeader,
        (args_offset, args_len): (usize, usize),
        sink: Rc<dyn ReplySink>,
    ) -> Slot {
        memory.touch(header.len as usize);
        let args_len = args_len.min(STRIDE - args_offset);
        Slot { memory: Some(memory), header, args: (args_offset, args_len), sink }
    }

    fn memory(&self) -> &Memory {
        self.memory.as_ref().expect("an unanswered slot has its memory")
    }

    /// What is asked.
    pub fn op(&self) -> Result<Op, Errno> {
        let (offset, len) = self.args;
        Op::decode(&self.header, &self.memory().bytes()[offset..offset + len], PAYLOAD_LEN)
    }

    /// The opcode, for the log.
    pub fn opcode(&self) -> u32 {
        self.header.opcode
    }

    /// The node that it is about; zero where it is about none.
    pub fn node(&self) -> u64 {
        self.header.nodeid
    }

    /// The request's number.
    pub fn unique(&self) -> u64 {
        self.header.unique
    }

    /// The thread that has made it, or 0 if it is of another PID namespace.
    pub fn client(&self) -> u32 {
        self.header.pid
    }

    /// When it arrived here.
    pub fn arrived(&self) -> Instant {
        self.memory().0.arrived
    }

    /// The length of the request or of the data that it asks for, in bytes: how much is copied for
    /// it.
    pub fn request_len(&self) -> u32 {
        match self.op() {
            Ok(Op::Read { size, .. }) => size,
            _ => self.header.len,
        }
    }

    /// A WRITE's data, and room for what a reply carries.
    pub fn payload_mut(&mut self) -> &mut [u8] {
        let memory = self.memory.as_mut().expect("an unanswered slot has its memory");
        &mut memory.bytes_mut()[HEAD_LEN..]
    }

    /// Answers with the first so many bytes of the payload, or an error.
    pub fn reply(mut self, result: Result<usize, Errno>) {
        let memory = self.memory.take().expect("an unanswered slot has its memory");
        self.answer(memory, result);
    }

    fn answer(&self, mut memory: Memory, result: Result<usize, Errno>) {
        if let Ok(len) = result {
            memory.touch(len);
        }
        self.sink.answer(memory, self.header.unique, result);
    }

    /// Ends a request that has no answer.
    pub fn discard(mut self) {
        let memory = self.memory.take().expect("an unanswered slot has its memory");
        self.sink.discard(memory);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            log::error!("a request (opcode {}) was dropped unanswered", self.header.opcode);
            self.answer(memory, Err(Errno::EIO));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[derive(Default)]
    struct Recorder {
        answers: RefCell<Vec<(u64, Result<usize, Errno>)>>,
        memory: RefCell<Vec<Memory>>,
    }

    impl ReplySink for Recorder {
        fn answer(&self, memory: Memory, unique: u64, result: Result<usize, Errno>) {
            self.answers.borrow_mut().push((unique, result));
            self.memory.borrow_mut().push(memory);
        }
        fn discard(&self, memory: Memory) {
            self.memory.borrow_mut().push(memory);
        }
    }

    fn slot(sink: &Rc<Recorder>) -> Slot {
        let memory = Memory::allocate(&[0]).unwrap().pop().unwrap();
        let header = InHeader { unique: 42, ..Default::default() };
        Slot::new(memory, header, (0, 0), sink.clone())
    }

    #[test]
    fn dropped_slot_answers_eio_once() {
        let sink = Rc::new(Recorder::default());
        drop(slot(&sink));
        assert_eq!(*sink.answers.borrow(), [(42, Err(Errno::EIO))]);
        assert_eq!(sink.memory.borrow().len(), 1);
    }

    #[test]
    fn reply_is_the_only_answer() {
        let sink = Rc::new(Recorder::default());
        slot(&sink).reply(Ok(8));
        assert_eq!(*sink.answers.borrow(), [(42, Ok(8))]);
    }

    #[test]
    fn discard_answers_nothing_and_returns_the_memory() {
        let sink = Rc::new(Recorder::default());
        slot(&sink).discard();
        assert!(sink.answers.borrow().is_empty());
        assert_eq!(sink.memory.borrow().len(), 1);
    }

    #[test]
    fn memories_do_not_overlap_and_payloads_are_page_aligned() {
        let mut all = Memory::allocate(&[0; 3]).unwrap();
        for (i, m) in all.iter_mut().enumerate() {
            m.bytes_mut().fill(i as u8 + 1);
        }
        for (i, m) in all.iter_mut().enumerate() {
            assert!(m.bytes().iter().all(|&b| b == i as u8 + 1));
            assert_eq!(m.iovecs(288)[1].iov_base as usize % 4096, 0);
        }
    }

    #[test]
    fn memory_outlives_its_siblings() {
        let mut all = Memory::allocate(&[0, 0]).unwrap();
        let mut last = all.pop().unwrap();
        drop(all);
        last.bytes_mut()[0] = 1;
    }

    #[test]
    fn release_keeps_the_front_and_zeroes_the_rest() {
        let mut memory = Memory::allocate(&[0]).unwrap().pop().unwrap();
        memory.bytes_mut().fill(9);
        memory.touch(PAYLOAD_LEN);
        memory.release();
        assert_eq!(memory.bytes()[HEAD_LEN + KEPT_LEN - 1], 9);
        assert_eq!(memory.bytes()[HEAD_LEN + KEPT_LEN], 0);
    }
}
