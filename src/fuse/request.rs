//! Decoding: a request's header and arguments become an [`Op`] of plain values.
//!
//! All knowledge of opcodes is here. Nothing is borrowed: the data of a WRITE stays where the
//! transport put it, and [`Op::Write`] says only how much of it there is.

use super::abi::{
    self, FallocateIn, GetattrIn, HandleIn, InHeader, InterruptIn, LseekIn, OpenIn, Plain,
    ReadWriteIn, SetattrIn, XattrIn, opcode,
};
use crate::errno::Errno;

/// One request, decoded.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    /// `stat`
    Getattr {
        /// The open file on whose behalf the kernel asks by itself, before a write to its page
        /// cache for example
        handle: Option<u64>,
    },
    /// `chmod`, `chown`, `truncate`, `utimensat`
    Setattr(SetattrIn),
    /// `open`, with the flags of open(2)
    Open {
        /// `O_*`
        flags: u32,
    },
    /// `pread`
    Read {
        /// The number in OPEN's reply, of this file or of another that fills the page cache
        handle: u64,
        /// In bytes
        offset: u64,
        /// In bytes
        size: u32,
    },
    /// `pwrite`; the data is in the payload
    Write {
        /// As for a READ
        handle: u64,
        /// In bytes
        offset: u64,
        /// In bytes
        size: u32,
        /// It is what the page cache held (`mmap`, or write-back): its client may believe it
        /// written.
        from_cache: bool,
        /// The file was opened with O_DSYNC or O_SYNC: answer when the data is on stable storage.
        durable: bool,
    },
    /// `statfs`
    Statfs,
    /// The last close of an open file
    Release {
        /// Its number in OPEN's reply
        handle: u64,
    },
    /// `fsync`, `fdatasync`
    Fsync {
        /// Its number in OPEN's reply
        handle: u64,
    },
    /// A close
    Flush {
        /// Its number in OPEN's reply
        handle: u64,
    },
    /// `fallocate`
    Fallocate {
        /// In bytes
        offset: u64,
        /// In bytes
        len: u64,
        /// `FALLOC_FL_*`
        mode: u32,
    },
    /// `lseek` with `SEEK_DATA` or `SEEK_HOLE`
    Lseek {
        /// In bytes
        offset: u64,
        /// `SEEK_*`
        whence: u32,
    },
    /// `getxattr`; the name is in the payload, and a zero byte behind it
    Getxattr {
        /// The room for the value, in bytes; 0: only its length is asked for
        room: u32,
    },
    /// `listxattr`
    Listxattr {
        /// The room for the names, in bytes; 0: only their length is asked for
        room: u32,
    },
    /// The end of a mount that has a block device; there is nothing to do beyond answering.
    Destroy,
    /// The client of a request has had a signal; the kernel waits for no answer.
    Interrupt {
        /// The request's number
        unique: u64,
    },
    /// A name in a directory; it is in the payload, and a zero byte behind it
    Lookup,
    /// `opendir`
    Opendir,
    /// `getdents`
    Readdir {
        /// The number behind the entry before the first one that is wanted; 0 at the beginning
        offset: u64,
        /// The room for entries, in bytes
        size: u32,
    },
    /// The last close of an open directory
    Releasedir,
    /// What makes, removes or renames something in a directory
    ChangeDirectory,
    /// FORGET and BATCH_FORGET: the kernel waits for no answer, and no node is ever forgotten.
    Unanswered,
}

impl Op {
    /// Decodes `args`, the bytes after the header. `payload_len` bounds what a READ may ask for and
    /// a WRITE may bring. `ENOSYS` for an operation that an exported file does not have, after
    /// which the kernel does without it; `EINVAL` for one that breaks the protocol.
    pub fn decode(header: &InHeader, args: &[u8], payload_len: usize) -> Result<Op, Errno> {
        // What the kernel hands over beyond the header; it never leaves a first argument
        // incomplete.
        let need = |bytes: usize| if args.len() < bytes { Err(Errno::EINVAL) } else { Ok(()) };
        let bounded = |size: u32| {
            if size as usize > payload_len { Err(Errno::EINVAL) } else { Ok(size) }
        };
        let handle = || need(size_of::<HandleIn>()).map(|()| HandleIn::read(args).fh);
        Ok(match header.opcode {
            opcode::FORGET | opcode::BATCH_FORGET => Op::Unanswered,
            opcode::INTERRUPT => {
                need(size_of::<InterruptIn>())?;
                Op::Interrupt { unique: InterruptIn::read(args).unique }
            }
            opcode::GETATTR => {
                need(size_of::<GetattrIn>())?;
                let arg = GetattrIn::read(args);
                let has_handle = arg.getattr_flags & abi::GETATTR_FH != 0;
                Op::Getattr { handle: has_handle.then_some(arg.fh) }
            }
            opcode::SETATTR => {
                need(size_of::<SetattrIn>())?;
                Op::Setattr(SetattrIn::read(args))
            }
            opcode::OPEN => {
                need(size_of::<OpenIn>())?;
                Op::Open { flags: OpenIn::read(args).flags }
            }
            opcode::READ => {
                need(size_of::<ReadWriteIn>())?;
                let arg = ReadWriteIn::read(args);
                Op::Read { handle: arg.fh, offset: arg.offset, size: bounded(arg.size)? }
            }
            opcode::WRITE => {
                need(size_of::<ReadWriteIn>())?;
                let arg = ReadWriteIn::read(args);
                Op::Write {
                    handle: arg.fh,
                    from_cache: arg.read_write_flags & abi::WRITE_CACHE != 0,
                    offset: arg.offset,
                    size: bounded(arg.size)?,
                    // O_SYNC includes the bit of O_DSYNC.
                    durable: arg.flags & libc::O_DSYNC as u32 != 0,
                }
            }
            opcode::STATFS => Op::Statfs,
            opcode::RELEASE => Op::Release { handle: handle()? },
            opcode::FSYNC => Op::Fsync { handle: handle()? },
            opcode::FLUSH => Op::Flush { handle: handle()? },
            opcode::FALLOCATE => {
                need(size_of::<FallocateIn>())?;
                let arg = FallocateIn::read(args);
                Op::Fallocate { offset: arg.offset, len: arg.length, mode: arg.mode }
            }
            opcode::LSEEK => {
                need(size_of::<LseekIn>())?;
                let arg = LseekIn::read(args);
                Op::Lseek { offset: arg.offset, whence: arg.whence }
            }
            opcode::GETXATTR => {
                need(size_of::<XattrIn>())?;
                Op::Getxattr { room: XattrIn::read(args).size }
            }
            opcode::LISTXATTR => {
                need(size_of::<XattrIn>())?;
                Op::Listxattr { room: XattrIn::read(args).size }
            }
            opcode::LOOKUP => Op::Lookup,
            opcode::OPENDIR => Op::Opendir,
            opcode::READDIR => {
                need(size_of::<ReadWriteIn>())?;
                let arg = ReadWriteIn::read(args);
                Op::Readdir { offset: arg.offset, size: bounded(arg.size)? }
            }
            opcode::RELEASEDIR => Op::Releasedir,
            opcode::SYMLINK
            | opcode::MKNOD
            | opcode::MKDIR
            | opcode::UNLINK
            | opcode::RMDIR
            | opcode::RENAME
            | opcode::LINK
            | opcode::CREATE
            | opcode::RENAME2
            | opcode::TMPFILE => Op::ChangeDirectory,
            opcode::DESTROY => Op::Destroy,
            _ => return Err(Errno::ENOSYS),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(opcode: u32) -> InHeader {
        InHeader { opcode, nodeid: abi::ROOT_ID, ..Default::default() }
    }

    #[test]
    fn write_carries_offset_size_and_durability() {
        let arg = ReadWriteIn {
            offset: 4096,
            size: 512,
            flags: (libc::O_WRONLY | libc::O_SYNC) as u32,
            ..Default::default()
        };
        let op = Op::decode(&header(opcode::WRITE), arg.as_bytes(), 1 << 20).unwrap();
        let expected = matches!(
            op,
            Op::Write { offset: 4096, size: 512, durable: true, from_cache: false, .. }
        );
        assert!(expected, "{op:?}");
        let arg = ReadWriteIn { fh: 7, read_write_flags: abi::WRITE_CACHE, ..arg };
        let op = Op::decode(&header(opcode::WRITE), arg.as_bytes(), 1 << 20).unwrap();
        assert!(matches!(op, Op::Write { handle: 7, from_cache: true, .. }), "{op:?}");
    }

    #[test]
    fn sizes_beyond_the_payload_are_refused() {
        let arg = ReadWriteIn { size: 4097, ..Default::default() };
        for code in [opcode::READ, opcode::WRITE, opcode::READDIR] {
            assert_eq!(Op::decode(&header(code), arg.as_bytes(), 4096).unwrap_err(), Errno::EINVAL);
        }
    }

    #[test]
    fn short_arguments_are_refused() {
        for code in [
            opcode::GETATTR,
            opcode::SETATTR,
            opcode::OPEN,
            opcode::READ,
            opcode::READDIR,
            opcode::WRITE,
            opcode::LSEEK,
            opcode::FSYNC,
            opcode::FLUSH,
            opcode::RELEASE,
            opcode::GETXATTR,
            opcode::LISTXATTR,
        ] {
            assert_eq!(Op::decode(&header(code), &[0; 7], 4096).unwrap_err(), Errno::EINVAL);
        }
    }

    #[test]
    fn unknown_operations_are_enosys() {
        assert_eq!(Op::decode(&header(4095), &[], 4096).unwrap_err(), Errno::ENOSYS);
    }

    #[test]
    fn forget_has_no_answer_whatever_the_node() {
        let other = InHeader { nodeid: 99, ..header(opcode::FORGET) };
        assert!(matches!(Op::decode(&other, &[], 4096), Ok(Op::Unanswered)));
    }
}
