//! The memory of requests, and [`Slot`], the token for one of them.
//!
//! Who has a slot's memory: *kernel → transport → handler → transport → kernel*. It is always exactly one
//! of them. A request reaches the handler as a `Slot`; answering consumes it, so that a second answer does
//! not compile, and one that is dropped unanswered answers EIO and logs.
//!
//! Memory comes from an `Arena`: one mapping per serving thread, made at start, cut into pieces of
//! a head and a payload. Its pages become resident when they are first used. The payload is page-aligned,
//! so that a backend's direct I/O can use it, and data is never moved:
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
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::backend::LENT_BYTES;
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
/// The payload of a WRITE of so many bytes is worth huge pages.
const GATHER_LEN: usize = PAYLOAD_LEN / 2;
/// Those, in bytes. Where they have another size nothing is moved.
const HUGE_LEN: usize = 2 << 20;
/// A burst is over when nothing has come for so long.
pub const BURST_OVER: Duration = Duration::from_secs(1);

/// One mapping, cut into [`Memory`]s.
struct Arena {
    base: NonNull<u8>,
    len: usize,
    /// Some of it has been moved to huge pages.
    has_huge: AtomicBool,
    /// There are none to be had.
    no_huge: AtomicBool,
}

// SAFETY: an arena is an address and a length, and gives no access to what is there but by its `Memory`s.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    fn new(count: usize) -> io::Result<Arena> {
        let len = count * STRIDE;
        // SAFETY: a new anonymous mapping touches no memory of ours. NORESERVE: most of it is never used.
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
        let arena =
            Arena { base, len, has_huge: AtomicBool::new(false), no_huge: AtomicBool::new(false) };
        // SAFETY: the range is the mapping just made. Huge pages would make a 4 KiB request resident as
        // 2 MiB; a kernel without them says EINVAL, which is as good.
        unsafe { libc::madvise(arena.base.as_ptr().cast(), len, libc::MADV_NOHUGEPAGE) };
        Ok(arena)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and every `Memory` in it is gone: each holds an `Rc` of the arena.
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
    /// It has been moved to huge pages, as far as that works.
    gathered: bool,
    arena: Arc<Arena>,
}

// SAFETY: it is the only owner of plain bytes.
unsafe impl Send for Piece {}

impl Memory {
    /// Makes one for each of `queues`, which may repeat. Fails with `ENOMEM` when address space runs
    /// out, or memory may not be promised that is not there (vm.overcommit_memory).
    pub fn allocate(queues: &[u16]) -> io::Result<Vec<Memory>> {
        let arena = Arc::new(Arena::new(queues.len())?);
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
                    gathered: false,
                    arena: arena.clone(),
                }))
            })
            .collect())
    }

    /// The kernel's queue that it belongs to.
    pub fn queue(&self) -> u16 {
        self.0.queue
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
        // SAFETY: the stride is mapped while the arena lives, initialised (to zero), and ours alone.
        unsafe { std::slice::from_raw_parts(self.0.head.as_ptr(), STRIDE) }
    }

    /// Head and payload together.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `&mut self` makes the borrow exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.0.head.as_ptr(), STRIDE) }
    }

    /// The head and the payload as the kernel's `iovec`s, for a ring entry of `head_len` bytes of header.
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

    /// Moves the memory to huge pages, until it is released.
    fn gather(&mut self) {
        if std::mem::replace(&mut self.0.gathered, true)
            || self.0.arena.no_huge.load(Ordering::Relaxed)
        {
            return;
        }
        self.0.arena.has_huge.store(true, Ordering::Relaxed);
        let arena = self.0.arena.base.as_ptr() as usize;
        let head = self.0.head.as_ptr() as usize;
        let from = (head / HUGE_LEN * HUGE_LEN).max(arena);
        let to = (head + STRIDE).next_multiple_of(HUGE_LEN).min(arena + self.0.arena.len);
        let advise = |advice| {
            // SAFETY: the range is inside the arena. The advice moves pages and leaves their content as it is, so it does not
            // matter that some are of the memories beside this one. Pages to which the kernel holds a reference,
            // a socket's for example, stay where they are.
            match unsafe { libc::madvise(from as *mut libc::c_void, to - from, advice) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        };
        let moved = advise(libc::MADV_HUGEPAGE).and_then(|()| advise(libc::MADV_COLLAPSE));
        // Those that are to come are small again.
        let _ = advise(libc::MADV_NOHUGEPAGE);
        if let Err(e) = moved
            && e.raw_os_error() != Some(libc::EAGAIN)
        {
            // The kernel may have looked for one long, in vain: once is enough. (EAGAIN: a page is in use.)
            log::debug!("no huge pages: {e}");
            self.0.arena.no_huge.store(true, Ordering::Relaxed);
        }
    }

    /// Whether a large request has left pages here.
    pub fn has_burst_pages(&self) -> bool {
        self.0.touched > KEPT_LEN
    }

    /// Gives back the pages that a burst of large requests left. Their content is lost, the head's too.
    pub fn release(&mut self) {
        if self.0.arena.has_huge.load(Ordering::Relaxed) {
            // A huge page goes when nothing of it is left, by whichever memory it came.
            self.0.gathered = false;
            self.give_up_from(0);
        } else if self.has_burst_pages() {
            self.give_up_from(HEAD_LEN + KEPT_LEN);
        }
    }

    /// Gives up all pages of a payload which a backend may have lent to the kernel ([`LENT_BYTES`]). Whatever still
    /// refers to them keeps them as they are.
    fn give_up_lent(&mut self) {
        if self.0.touched >= LENT_BYTES {
            self.give_up_from(HEAD_LEN);
        }
    }

    /// Gives up what is behind the first `kept` bytes.
    fn give_up_from(&mut self, kept: usize) {
        let tail = &mut self.bytes_mut()[kept..];
        // SAFETY: the pages are ours, anonymous and private: they read as zeroes from now on, which is as
        // initialised as before.
        let done =
            unsafe { libc::madvise(tail.as_mut_ptr().cast(), tail.len(), libc::MADV_DONTNEED) };
        // Only a locked or a wrong range is refused (madvise(2)), and this process locks no memory.
        assert_eq!(done, 0, "madvise: {}", io::Error::last_os_error());
        self.0.touched = kept.saturating_sub(HEAD_LEN);
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

/// Where a slot's memory goes with the answer: a transport.
pub trait Home {
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
    home: Rc<dyn Home>,
}

impl Slot {
    /// A request that has arrived in `memory`, with `args_len` bytes of arguments at `args_offset`.
    pub fn new(
        mut memory: Memory,
        header: InHeader,
        (args_offset, args_len): (usize, usize),
        home: Rc<dyn Home>,
    ) -> Slot {
        memory.touch(header.len as usize);
        let args_len = args_len.min(STRIDE - args_offset);
        Slot { memory: Some(memory), header, args: (args_offset, args_len), home }
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

    /// The request's number.
    pub fn unique(&self) -> u64 {
        self.header.unique
    }

    /// The thread that has made it, or 0 if it is of another PID namespace.
    pub fn client(&self) -> u32 {
        self.header.pid
    }

    /// The length of the request or of the data that it asks for, in bytes: how much is copied for it.
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

    /// For a backend that hands the payload's pages to the kernel: with huge pages a long one goes in few large pieces
    /// instead of many small ones. (Not so from the start: a request of 4 KiB would make 2 MiB resident.)
    pub fn gather_long_payload(&mut self) {
        if self.header.len as usize >= GATHER_LEN {
            self.memory.as_mut().expect("an unanswered slot has its memory").gather();
        }
    }

    /// Gives up the pages of the payload, which somebody may still read: the answer goes into others.
    pub fn give_up_lent(&mut self) {
        self.memory.as_mut().expect("an unanswered slot has its memory").give_up_lent();
    }

    /// Answers with the first so many bytes of the payload, or an error.
    pub fn reply(mut self, result: Result<usize, Errno>) {
        let memory = self.memory.take().expect("an unanswered slot has its memory");
        self.answer(memory, result);
    }

    fn answer(&self, mut memory: Memory, result: Result<usize, Errno>) {
        match result {
            Ok(len) => memory.touch(len),
            // What failed may not have come to its end everywhere.
            Err(_) => memory.give_up_lent(),
        }
        self.home.answer(memory, self.header.unique, result);
    }

    /// Ends a request that has no answer.
    pub fn discard(mut self) {
        let memory = self.memory.take().expect("an unanswered slot has its memory");
        self.home.discard(memory);
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

    impl Home for Recorder {
        fn answer(&self, memory: Memory, unique: u64, result: Result<usize, Errno>) {
            self.answers.borrow_mut().push((unique, result));
            self.memory.borrow_mut().push(memory);
        }
        fn discard(&self, memory: Memory) {
            self.memory.borrow_mut().push(memory);
        }
    }

    fn slot(home: &Rc<Recorder>) -> Slot {
        let memory = Memory::allocate(&[0]).unwrap().pop().unwrap();
        let header = InHeader { unique: 42, ..Default::default() };
        Slot::new(memory, header, (0, 0), home.clone())
    }

    #[test]
    fn dropped_slot_answers_eio_once() {
        let home = Rc::new(Recorder::default());
        drop(slot(&home));
        assert_eq!(*home.answers.borrow(), [(42, Err(Errno::EIO))]);
        assert_eq!(home.memory.borrow().len(), 1);
    }

    #[test]
    fn reply_is_the_only_answer() {
        let home = Rc::new(Recorder::default());
        slot(&home).reply(Ok(8));
        assert_eq!(*home.answers.borrow(), [(42, Ok(8))]);
    }

    #[test]
    fn discard_answers_nothing_and_returns_the_memory() {
        let home = Rc::new(Recorder::default());
        slot(&home).discard();
        assert!(home.answers.borrow().is_empty());
        assert_eq!(home.memory.borrow().len(), 1);
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
    fn pages_of_a_failed_request_are_not_written_to_again() {
        let home = Rc::new(Recorder::default());
        let (reader, writer) = crate::sys::pipe(PAYLOAD_LEN).unwrap();
        let mut slot = slot(&home);
        slot.payload_mut().fill(7);
        slot.memory.as_mut().unwrap().touch(PAYLOAD_LEN);
        assert_eq!(crate::sys::vmsplice(&writer, slot.payload_mut()).unwrap(), PAYLOAD_LEN);
        slot.reply(Err(Errno::EIO));
        let mut memory = home.memory.borrow_mut().pop().unwrap();
        memory.bytes_mut().fill(9);
        let mut in_pipe = vec![0; PAYLOAD_LEN];
        assert_eq!(crate::sys::read(&reader, &mut in_pipe).unwrap(), PAYLOAD_LEN);
        assert!(in_pipe.iter().all(|&byte| byte == 7));
    }

    /// How much of the process's memory at `bytes` is in huge pages, in KiB.
    fn huge_kib(bytes: &[u8]) -> u64 {
        let address = bytes.as_ptr() as usize + HEAD_LEN;
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        let mut kib = 0;
        for line in smaps.lines() {
            if let Some((from, rest)) = line.split_once('-')
                && let Ok(from) = usize::from_str_radix(from, 16)
            {
                let to = rest.split(' ').next().unwrap();
                inside = (from..usize::from_str_radix(to, 16).unwrap()).contains(&address);
            } else if inside && line.starts_with("AnonHugePages:") {
                kib += line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap();
            }
        }
        kib
    }

    #[test]
    fn huge_pages_change_nothing_and_release_gives_them_back() {
        let mut all = Memory::allocate(&[0; 8]).unwrap();
        for (i, memory) in all.iter_mut().enumerate() {
            memory.bytes_mut().fill(i as u8 + 1);
        }
        // Every second one: their neighbours share the pages.
        all.iter_mut().step_by(2).for_each(Memory::gather);
        for (i, memory) in all.iter().enumerate() {
            assert!(memory.bytes().iter().all(|&byte| byte == i as u8 + 1));
        }
        let huge = huge_kib(all[4].bytes());
        all.iter_mut().for_each(Memory::release);
        assert_eq!(huge_kib(all[4].bytes()), 0);
        assert!(all.iter().all(|memory| memory.bytes().iter().all(|&byte| byte == 0)));
        if huge == 0 {
            println!("skipped: no huge pages here");
        }
    }

    #[test]
    fn huge_pages_change_nothing_that_a_pipe_holds() {
        let mut memory = Memory::allocate(&[0; 4]).unwrap().remove(1);
        let (reader, writer) = crate::sys::pipe(PAYLOAD_LEN).unwrap();
        memory.bytes_mut().fill(7);
        memory.touch(PAYLOAD_LEN);
        let payload = &memory.bytes()[HEAD_LEN..];
        assert_eq!(crate::sys::vmsplice(&writer, payload).unwrap(), PAYLOAD_LEN);
        memory.gather();
        let mut in_pipe = vec![0; PAYLOAD_LEN];
        assert_eq!(crate::sys::read(&reader, &mut in_pipe).unwrap(), PAYLOAD_LEN);
        assert!(in_pipe.iter().all(|&byte| byte == 7));
        assert!(memory.bytes().iter().all(|&byte| byte == 7));
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
