//! Encoding: what the handler answers becomes the bytes of a reply.

use std::time::Duration;

use super::abi::{
    Attr, AttrOut, EntryOut, LseekOut, OpenOut, Plain, StatfsOut, WriteOut, XattrOut,
};

/// A successful answer.
#[derive(Clone, Copy, Debug)]
pub enum Reply {
    /// Nothing but success
    Done,
    /// So many bytes were read; they are in the payload already.
    Data(usize),
    /// So many bytes were written.
    Written(u32),
    /// `stat`
    Attr {
        /// What it shows
        attr: Attr,
        /// For how long the kernel may show it again without asking
        valid: Duration,
    },
    /// A name was found in a directory; its node has the number `attr.ino`.
    Entry {
        /// What `stat` shows
        attr: Attr,
        /// For how long the kernel may show it again without asking
        valid: Duration,
        /// For how long the name stands for that node
        entry_valid: Duration,
    },
    /// A file was opened.
    Opened {
        /// Its number in later requests
        handle: u64,
        /// `FOPEN_*`
        flags: u32,
    },
    /// `statfs`
    Statfs(StatfsOut),
    /// The length of an attribute's value, or of all names, in bytes
    XattrLen(u32),
    /// Where data or a hole begins, in bytes
    Seek(u64),
    /// None is expected.
    Unanswered,
}

impl Reply {
    /// Puts the reply into the payload and returns its length in bytes.
    pub fn encode(&self, payload: &mut [u8]) -> usize {
        fn put<T: Plain>(payload: &mut [u8], value: T) -> usize {
            let bytes = value.as_bytes();
            payload[..bytes.len()].copy_from_slice(bytes);
            bytes.len()
        }
        match *self {
            Reply::Done | Reply::Unanswered => 0,
            Reply::Data(len) => len,
            Reply::Written(size) => put(payload, WriteOut { size, padding: 0 }),
            Reply::Attr { attr, valid } => {
                let (attr_valid, attr_valid_nsec) = (valid.as_secs(), valid.subsec_nanos());
                put(payload, AttrOut { attr, attr_valid, attr_valid_nsec, dummy: 0 })
            }
            Reply::Entry { attr, valid, entry_valid } => put(
                payload,
                EntryOut {
                    nodeid: attr.ino,
                    generation: 0,
                    entry_valid: entry_valid.as_secs(),
                    attr_valid: valid.as_secs(),
                    entry_valid_nsec: entry_valid.subsec_nanos(),
                    attr_valid_nsec: valid.subsec_nanos(),
                    attr,
                },
            ),
            Reply::Opened { handle, flags } => {
                put(payload, OpenOut { fh: handle, open_flags: flags, backing_id: 0 })
            }
            Reply::Statfs(statfs) => put(payload, statfs),
            Reply::XattrLen(size) => put(payload, XattrOut { size, padding: 0 }),
            Reply::Seek(offset) => put(payload, LseekOut { offset }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_those_of_the_kernel() {
        let mut payload = [0; 256];
        let len = |reply: Reply, payload: &mut [u8]| reply.encode(payload);
        assert_eq!(len(Reply::Done, &mut payload), 0);
        assert_eq!(len(Reply::Data(100), &mut payload), 100);
        assert_eq!(len(Reply::Written(7), &mut payload), 8);
        assert_eq!(payload[..4], [7, 0, 0, 0]);
        assert_eq!(
            len(Reply::Attr { attr: Attr::default(), valid: Duration::ZERO }, &mut payload),
            104
        );
        let (attr, valid) = (Attr { ino: 7, ..Attr::default() }, Duration::ZERO);
        assert_eq!(len(Reply::Entry { attr, valid, entry_valid: valid }, &mut payload), 128);
        assert_eq!(payload[0], 7);
        assert_eq!(len(Reply::Opened { handle: 3, flags: 1 }, &mut payload), 16);
        assert_eq!(payload[..9], [3, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(len(Reply::Statfs(StatfsOut::default()), &mut payload), 80);
        assert_eq!(len(Reply::XattrLen(5), &mut payload), 8);
        assert_eq!(len(Reply::Seek(9), &mut payload), 8);
    }
}
