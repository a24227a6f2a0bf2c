//! The FUSE protocol: its structures ([`abi`]), the decoding of requests ([`request`])
//! and the encoding of replies ([`reply`]).

pub mod abi;
pub mod reply;
pub mod request;
