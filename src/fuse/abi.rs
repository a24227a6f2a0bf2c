//! The kernel's FUSE structures, as in `include/uapi/linux/fuse.h` (protocol 7.45).
//!
//! Only what an exported file, or a directory of them, needs. Every structure is plain old data without padding of its own
//! (checked below by size), so it may be copied from and to bytes.

#![allow(unsafe_code)]

/// `FUSE_KERNEL_VERSION`
pub const KERNEL_VERSION: u32 = 7;
/// The newest minor version that this code was written against.
pub const KERNEL_MINOR_VERSION: u32 = 45;
/// The oldest minor version served: 7.31 (Linux 5.4) has every field used here.
pub const OLDEST_MINOR_VERSION: u32 = 31;
/// `FUSE_ROOT_ID`: the exported file, or the directory of several, is the root of its mount.
pub const ROOT_ID: u64 = 1;

/// `enum fuse_opcode`, the ones that are answered.
#[allow(missing_docs)] // the kernel's names
pub mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const TMPFILE: u32 = 51;
}

/// INIT flags; the ones from bit 32 on travel in `flags2`.
#[allow(missing_docs)] // the kernel's names
pub mod init {
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const WRITEBACK_CACHE: u64 = 1 << 16;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const ABORT_ERROR: u64 = 1 << 21;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
    pub const OVER_IO_URING: u64 = 1 << 41;
}

/// `FOPEN_DIRECT_IO`: no page cache of the kernel's own in front of the export.
pub const FOPEN_DIRECT_IO: u32 = 1 << 0;
/// `FOPEN_KEEP_CACHE`: what the page cache holds of the file stays.
pub const FOPEN_KEEP_CACHE: u32 = 1 << 1;
/// `FOPEN_NOFLUSH`: no FLUSH when this open file is closed.
pub const FOPEN_NOFLUSH: u32 = 1 << 5;
/// `FOPEN_PARALLEL_DIRECT_WRITES`: direct writes that do not extend the file run in parallel.
pub const FOPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;

/// `FUSE_WRITE_CACHE`: a WRITE of what the page cache holds, which its client may believe written
/// long since.
pub const WRITE_CACHE: u32 = 1 << 0;

/// `FUSE_NOTIFY_INVAL_INODE`, in the place of an error in a message that answers no request.
pub const NOTIFY_INVAL_INODE: i32 = 2;

/// SETATTR's `valid` bits.
#[allow(missing_docs)] // the kernel's names
pub mod fattr {
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
    pub const CTIME: u32 = 1 << 10;
}

/// `FUSE_FSYNC_FDATASYNC` needs no bit of ours: every flush covers data and size alike.
/// `FUSE_DEV_IOC_CLONE` = `_IOR(229, 0, uint32_t)`
pub const DEV_IOC_CLONE: libc::c_ulong = 0x8004_e500;

/// `FUSE_IO_URING_CMD_REGISTER`
pub const FUSE_IO_URING_CMD_REGISTER: u32 = 1;
/// `FUSE_IO_URING_CMD_COMMIT_AND_FETCH`
pub const FUSE_IO_URING_CMD_COMMIT_AND_FETCH: u32 = 2;

/// Implements [`Plain`] for structures of the size the kernel gives them.
macro_rules! plain {
    ($($name:ident: $size:expr),* $(,)?) => {$(
        const _: () = assert!(size_of::<$name>() == $size);
        // SAFETY: repr(C), made of integers only, and of the kernel's size, which its fields add up
        // to: there is no padding, and every bit pattern is a value.
        unsafe impl Plain for $name {}
    )*};
}

/// Structures that may be copied from and to bytes.
///
/// # Safety
/// The type must be `repr(C)`, without padding, and every bit pattern must be a valid value.
pub unsafe trait Plain: Copy + Default {
    /// Reads the value from the front of `bytes`; what is missing is zero, as the kernel's own
    /// compatibility rule for grown structures has it.
    fn read(bytes: &[u8]) -> Self {
        let mut value = Self::default();
        let n = bytes.len().min(size_of::<Self>());
        // SAFETY: `n` bytes lie in both, the two cannot overlap, and `Plain` allows any bytes.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), (&raw mut value).cast::<u8>(), n);
        }
        value
    }

    /// The value's bytes.
    fn as_bytes(&self) -> &[u8] {
        // SAFETY: `Plain` has no padding, so all of its bytes are initialised.
        unsafe { std::slice::from_raw_parts((&raw const *self).cast(), size_of::<Self>()) }
    }
}

/// `struct fuse_in_header`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)] // the kernel's fields
pub struct InHeader {
    pub len: u32,
    pub opcode: u32,
    pub unique: u64,
    pub nodeid: u64,
    pub uid: u32,
    pub gid: u32,
    pub pid: u32,
    pub total_extlen: u16,
    pub padding: u16,
}

/// `struct fuse_out_header`; `error` is a negative errno.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct OutHeader {
    pub len: u32,
    pub error: i32,
    pub unique: u64,
}

/// `struct fuse_init_in`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct InitIn {
    pub major: u32,
    pub minor: u32,
    pub max_readahead: u32,
    pub flags: u32,
    pub flags2: u32,
    pub unused: [u32; 11],
}

/// `struct fuse_init_out`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct InitOut {
    pub major: u32,
    pub minor: u32,
    pub max_readahead: u32,
    pub flags: u32,
    pub max_background: u16,
    pub congestion_threshold: u16,
    pub max_write: u32,
    pub time_gran: u32,
    pub max_pages: u16,
    pub map_alignment: u16,
    pub flags2: u32,
    pub max_stack_depth: u32,
    pub request_timeout: u16,
    pub unused: [u16; 11],
}

/// `struct fuse_attr`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct Attr {
    pub ino: u64,
    pub size: u64,
    pub blocks: u64,
    pub atime: u64,
    pub mtime: u64,
    pub ctime: u64,
    pub atimensec: u32,
    pub mtimensec: u32,
    pub ctimensec: u32,
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    pub blksize: u32,
    pub flags: u32,
}

/// `struct fuse_attr_out`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct AttrOut {
    pub attr_valid: u64,
    pub attr_valid_nsec: u32,
    pub dummy: u32,
    pub attr: Attr,
}

/// `struct fuse_entry_out`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct EntryOut {
    pub nodeid: u64,
    pub generation: u64,
    pub entry_valid: u64,
    pub attr_valid: u64,
    pub entry_valid_nsec: u32,
    pub attr_valid_nsec: u32,
    pub attr: Attr,
}

/// `struct fuse_dirent`, without the name that follows; the next one begins at a multiple of eight
/// bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct Dirent {
    pub ino: u64,
    pub off: u64,
    pub namelen: u32,
    pub kind: u32,
}

/// `FUSE_GETATTR_FH`: `fh` means something.
pub const GETATTR_FH: u32 = 1 << 0;

/// `struct fuse_getattr_in`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct GetattrIn {
    pub getattr_flags: u32,
    pub dummy: u32,
    pub fh: u64,
}

/// `struct fuse_setattr_in`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct SetattrIn {
    pub valid: u32,
    pub padding: u32,
    pub fh: u64,
    pub size: u64,
    pub lock_owner: u64,
    pub atime: u64,
    pub mtime: u64,
    pub ctime: u64,
    pub atimensec: u32,
    pub mtimensec: u32,
    pub ctimensec: u32,
    pub mode: u32,
    pub unused4: u32,
    pub uid: u32,
    pub gid: u32,
    pub unused5: u32,
}

/// `struct fuse_open_in`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct OpenIn {
    pub flags: u32,
    pub open_flags: u32,
}

/// `struct fuse_open_out`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct OpenOut {
    pub fh: u64,
    pub open_flags: u32,
    pub backing_id: i32,
}

/// What `struct fuse_flush_in`, `fuse_fsync_in` and `fuse_release_in` begin with.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct HandleIn {
    pub fh: u64,
}

/// `struct fuse_interrupt_in`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct InterruptIn {
    pub unique: u64,
}

/// `struct fuse_read_in`; `struct fuse_write_in` differs in names that are not used here.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct ReadWriteIn {
    pub fh: u64,
    pub offset: u64,
    pub size: u32,
    pub read_write_flags: u32,
    pub lock_owner: u64,
    pub flags: u32,
    pub padding: u32,
}

/// `struct fuse_write_out`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct WriteOut {
    pub size: u32,
    pub padding: u32,
}

/// `struct fuse_notify_inval_inode_out`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct NotifyInvalInodeOut {
    pub ino: u64,
    pub off: i64,
    pub len: i64,
}

/// `struct fuse_getxattr_in`, of GETXATTR and LISTXATTR
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct XattrIn {
    pub size: u32,
    pub padding: u32,
}

/// `struct fuse_getxattr_out`, of GETXATTR and LISTXATTR
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct XattrOut {
    pub size: u32,
    pub padding: u32,
}

/// `struct fuse_statfs_out` (its only member is a `struct fuse_kstatfs`)
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct StatfsOut {
    pub blocks: u64,
    pub bfree: u64,
    pub bavail: u64,
    pub files: u64,
    pub ffree: u64,
    pub bsize: u32,
    pub namelen: u32,
    pub frsize: u32,
    pub padding: u32,
    pub spare: [u32; 6],
}

/// `struct fuse_fallocate_in`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct FallocateIn {
    pub fh: u64,
    pub offset: u64,
    pub length: u64,
    pub mode: u32,
    pub padding: u32,
}

/// `struct fuse_lseek_in`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct LseekIn {
    pub fh: u64,
    pub offset: u64,
    pub whence: u32,
    pub padding: u32,
}

/// `struct fuse_lseek_out`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct LseekOut {
    pub offset: u64,
}

/// `struct fuse_uring_ent_in_out`: the ring's own part of an entry's header block.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct UringEntInOut {
    pub flags: u64,
    pub commit_id: u64,
    pub payload_sz: u32,
    pub padding: u32,
    pub reserved: u64,
}

/// `struct fuse_uring_req_header`: where its three parts lie.
#[allow(missing_docs)]
pub mod uring_header {
    pub const IN_OUT: usize = 0;
    pub const OP_IN: usize = 128;
    pub const OP_IN_LEN: usize = 128;
    pub const RING_ENT: usize = 256;
    pub const LEN: usize = 288;
}

/// `struct fuse_uring_cmd_req`: the front of the SQE's 80-byte command area.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct UringCmdReq {
    pub flags: u64,
    pub commit_id: u64,
    pub qid: u16,
    pub padding: [u8; 6],
}

impl UringCmdReq {
    /// The command area of an SQE that carries this request.
    pub fn to_command(&self) -> [u8; 80] {
        let mut command = [0; 80];
        command[..size_of::<Self>()].copy_from_slice(self.as_bytes());
        command
    }
}

plain! {
    InHeader: 40, OutHeader: 16, InitIn: 64, InitOut: 64, Attr: 88, AttrOut: 104, SetattrIn: 88,
    OpenIn: 8, OpenOut: 16, HandleIn: 8, InterruptIn: 8, ReadWriteIn: 40, WriteOut: 8, StatfsOut: 80,
    FallocateIn: 32, NotifyInvalInodeOut: 24, GetattrIn: 16, XattrIn: 8, XattrOut: 8,
    LseekIn: 24, LseekOut: 8, EntryOut: 128, Dirent: 24, UringEntInOut: 32, UringCmdReq: 24,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_input_reads_as_zeroes() {
        let header = InHeader::read(&[1, 0, 0, 0, 26]);
        assert_eq!((header.len, header.opcode, header.unique), (1, 26, 0));
    }

    #[test]
    fn bytes_round_trip() {
        let out = OutHeader { len: 16, error: -5, unique: 7 };
        let back = OutHeader::read(out.as_bytes());
        assert_eq!((back.len, back.error, back.unique), (16, -5, 7));
    }

    #[test]
    fn command_area_begins_with_the_request() {
        let command = UringCmdReq { qid: 0x0102, commit_id: 9, ..Default::default() }.to_command();
        assert_eq!(command[8..18], [9, 0, 0, 0, 0, 0, 0, 0, 2, 1]);
    }
}
