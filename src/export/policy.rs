//! What the user can decide of an export.

/// What a truncation does to a disk whose size is fixed.
///
/// A program that truncates relies on reading zeroes behind what it then writes (`cp` skips what it
/// takes for zeroes), so it must not be told that it was done when nothing was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Truncate {
    /// `EOPNOTSUPP`, and nothing is changed.
    Refuse,
    /// Zeroes what would be cut off, and keeps the size.
    Zero,
}

/// What the kernel's page cache does for files that are opened without O_DIRECT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// Nothing: every read and write is a request.
    None,
    /// It serves reads. A write ends when the source has it.
    Writethrough,
    /// It also keeps writes until fsync, close or memory pressure (`FUSE_WRITEBACK_CACHE`). The
    /// kernel then owns the size and the time stamps.
    Writeback,
}

/// What the user asked of an export.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Writes are allowed; implies that the source allows them.
    pub writable: bool,
    /// A write past the end makes the source longer, and a truncation sets its length. Else the
    /// size is fixed.
    pub growable: bool,
    /// What a truncation does where the size is fixed.
    pub truncate: Truncate,
    /// The page cache in front of it.
    pub cache: Cache,
    /// What the page cache holds stays from the last close to the next open: nobody else writes to
    /// the source.
    pub keep_cache: bool,
    /// Other users may use the file, as far as its mode lets them.
    pub allow_other: bool,
    /// The file's owner.
    pub uid: u32,
    /// The file's group.
    pub gid: u32,
}
