//! The errors that FUSE may answer.

use std::io;

/// A positive errno that FUSE accepts (1..=511). `ENOSYS` is made by the decoder only: the kernel
/// takes it as "never ask again", so no failure of a backend may become one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(i32);

#[allow(missing_docs)] // errno(3)
impl Errno {
    pub const EPERM: Errno = Errno(libc::EPERM);
    pub const ENOENT: Errno = Errno(libc::ENOENT);
    pub const EIO: Errno = Errno(libc::EIO);
    pub const ENFILE: Errno = Errno(libc::ENFILE);
    pub const EINTR: Errno = Errno(libc::EINTR);
    pub const ENXIO: Errno = Errno(libc::ENXIO);
    pub const EINVAL: Errno = Errno(libc::EINVAL);
    pub const EFBIG: Errno = Errno(libc::EFBIG);
    pub const ENOSPC: Errno = Errno(libc::ENOSPC);
    pub const EROFS: Errno = Errno(libc::EROFS);
    pub const ENOSYS: Errno = Errno(libc::ENOSYS);
    pub const ENODATA: Errno = Errno(libc::ENODATA);
    pub const ERANGE: Errno = Errno(libc::ERANGE);
    pub const EOPNOTSUPP: Errno = Errno(libc::EOPNOTSUPP);

    /// Whether it tells of something that went wrong, and not only that there is no such operation,
    /// attribute (or no room for its value), data or hole.
    pub fn is_failure(self) -> bool {
        ![libc::ENOSYS, libc::ENODATA, libc::ERANGE, libc::ENXIO].contains(&self.0)
    }

    /// The value as `struct fuse_out_header` wants it: negative.
    pub fn wire(self) -> i32 {
        -self.0
    }
}

impl From<io::Error> for Errno {
    fn from(e: io::Error) -> Errno {
        Errno::from_ref(&e)
    }
}

impl Errno {
    /// A backend's error as the client sees it.
    pub fn from_ref(e: &io::Error) -> Errno {
        match e.raw_os_error() {
            // "Not implemented" is about this request, not about the operation for all time.
            Some(libc::ENOSYS) => Errno::EOPNOTSUPP,
            // These two are about our own way of doing I/O, and mean nothing to the client.
            Some(libc::EAGAIN | libc::EINTR) => Errno::EIO,
            Some(errno) if (1..=511).contains(&errno) => Errno(errno),
            _ => Errno::EIO,
        }
    }
}

impl std::fmt::Debug for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", io::Error::from_raw_os_error(self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_never_answers_enosys() {
        let errno = |n| Errno::from(io::Error::from_raw_os_error(n));
        assert_eq!(errno(libc::ENOSYS), Errno::EOPNOTSUPP);
        assert_eq!(errno(libc::ENOSPC), Errno::ENOSPC);
        assert_eq!(errno(512), Errno::EIO);
        assert_eq!(Errno::from(io::Error::other("no errno")), Errno::EIO);
    }
}
