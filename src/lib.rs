//! diskfuse shows a disk as a file.
//!
//! ```text
//!                   kernel
//!        /dev/fuse |      | io_uring, a queue per CPU
//!   transport::legacy    transport::uring      one thread each, a LocalExecutor on it
//!                   \    /
//!                 slot::Slot                   the token for one request
//!                     |
//!            fuse::request::Op                 decoded
//!                     |
//!              export::Export                  what it means for a disk
//!                     |
//!              backend::Lane                   one thread's way to the bytes
//!              /            \
//!       backend::file    backend::nbd
//! ```
//!
//! Data flows one way: kernel → slot → request → export → backend → reply → kernel. A small request
//! stays on the thread of its CPU's queue; large ones are shared out between threads. The control
//! thread ([`run`]) mounts, waits for a signal or the end of the connection, and unmounts; it never
//! touches data.
//!
//! Where to find what:
//!
//! | to change | look at |
//! |---|---|
//! | an option, `--help` | [`cli`], then [`run`], which hands it on; man/diskfuse.1 |
//! | what happens from start to end, the exit status | [`run`] |
//! | signals; the background and the pidfile; what is logged where | [`signals`]; [`daemon`]; [`logging`] |
//! | what --help shows, what a word may have been meant as | [`help`], [`hints`] |
//! | how mount(8) calls; what systemd is told | [`mount_helper`]; [`service`], configs/systemd |
//! | mounting, unmounting, what is found at the mountpoint | [`mount`], [`place`] |
//! | what an operation of FUSE means, the size, the cache modes | [`export`] |
//! | the FUSE protocol, a new operation | [`fuse`], then [`export`] |
//! | what is negotiated with the kernel, how many threads there are | [`session`] |
//! | whether a thread polls, and which one serves a request | [`transport::pace`], [`transport::queues`] |
//! | the two ways of requests | [`transport::legacy`], [`transport::uring`] |
//! | a request's memory | [`transport::slot`], `transport::entries` |
//! | interrupted clients; errors that an fsync has to tell | [`interrupts`]; [`open_files`] |
//! | counters | [`stats`] |
//! | another kind of source | [`backend`], whose two traits it implements |
//! | images and block devices | [`backend::file`] |
//! | the NBD client: its picture is in | [`backend::nbd`] |
//! | NBD: URIs; connecting, TLS, the handshake | [`backend::nbd::uri`]; its `dial`, `connect`, `tls`, `handshake` |
//! | NBD: a command | its `wire`, `inflight`, `commands` |
//! | NBD: lost connections, and what is written again | its `connections`, `unflushed` |
//! | NBD: reading ahead, holes | its `ahead`, `holes`, `extents` |
//!
//! Modules that may use `unsafe`, and for what:
//!
//! | module | the fact it rests on |
//! |---|---|
//! | [`sys`] | arguments are values, or references that live for the call |
//! | [`fuse::abi`] | structures without padding, checked by size |
//! | [`transport::slot`] | each piece of the mapping has one owner |
//! | [`transport::ring`] | memory given to the kernel is not used until its completion is reaped |
//! | [`transport::entries`] | an entry's memory is moved in with the commit, and out with the completion |
//! | `backend::nbd::inflight` | a buffer is in the table only while a live request borrows it |
//! | `backend::nbd::stream_copy` | vectors of bytes, aligned where they are written |
//! | [`pool`] | a buffer on loan stays borrowed until the work has ended |

pub mod ask;
pub mod backend;
pub mod cli;
pub mod daemon;
pub mod errands;
pub mod errno;
pub mod export;
pub mod fuse;
pub mod help;
pub mod hints;
pub mod info;
pub mod interrupts;
pub mod io;
pub mod locks;
pub mod logging;
pub mod mount;
pub mod mount_helper;
pub mod mounts;
pub mod open_files;
pub mod own_folder;
pub mod partitions;
pub mod place;
pub mod pool;
pub mod privileges;
pub mod report;
pub mod run;
pub mod server;
pub mod service;
pub mod session;
pub mod signals;
pub mod stats;
pub mod sys;
pub mod transport;
