//! The FUSE protocol: its structures ([`abi`]), the decoding of requests ([`request`]), the
//! encoding of replies ([`reply`]), and what is told to the kernel unasked ([`notify`]).

pub mod abi;
pub mod notify;
pub mod reply;
pub mod request;
