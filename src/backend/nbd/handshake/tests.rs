//! The client's side against a peer that says what it was told to, and records what it hears.

use super::*;
use std::io::Cursor;

#[derive(Default)]
struct Script {
    incoming: Cursor<Vec<u8>>,
    sent: Vec<u8>,
}

impl Read for Script {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.incoming.read(buf)
    }
}

impl Write for Script {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.sent.extend(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn haggling(incoming: &[Vec<u8>]) -> Haggling<Script> {
    let incoming = Cursor::new(incoming.concat());
    Haggling::new(Script { incoming, sent: Vec::new() }, Duration::from_secs(1))
}

fn greeting(flags: u16) -> Vec<u8> {
    [&b"NBDMAGICIHAVEOPT"[..], &flags.to_be_bytes()].concat()
}

fn reply(option: Opt, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend((option as u32).to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn export_info(size: u64, flags: u16) -> Vec<u8> {
    [&info::EXPORT.to_be_bytes()[..], &size.to_be_bytes(), &flags.to_be_bytes()].concat()
}

fn block_size_info(sizes: [u32; 3]) -> Vec<u8> {
    let mut data = info::BLOCK_SIZE.to_be_bytes().to_vec();
    data.extend(sizes.iter().flat_map(|size| size.to_be_bytes()));
    data
}

fn string(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    put_string(&mut bytes, text);
    bytes
}

#[test]
fn the_client_repeats_the_flags_that_it_understands() {
    for (server, client) in [(3, 3), (1, 1), (0xffff, 3)] {
        let mut peer = haggling(&[greeting(server)]);
        assert_eq!(peer.greet().unwrap(), Greeting::FixedNewstyle);
        assert_eq!(peer.into_stream().sent, u32::to_be_bytes(client));
    }
}

#[test]
fn older_servers_are_recognized_before_anything_is_sent() {
    let oldstyle = [&b"NBDMAGIC"[..], &OLDSTYLE_MAGIC.to_be_bytes()].concat();
    for (hello, older) in [
        (greeting(0), Older::Newstyle),
        (greeting(2), Older::Newstyle),
        (oldstyle, Older::Oldstyle),
    ] {
        let mut peer = haggling(&[hello]);
        assert_eq!(peer.greet().unwrap(), Greeting::Older(older));
        assert!(peer.into_stream().sent.is_empty());
    }
}

#[test]
fn other_protocols_are_refused() {
    let error = haggling(&[b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()]).greet().unwrap_err();
    assert!(error.to_string().contains("no NBD server"), "{error}");
    let error = haggling(&[b"NBD".to_vec()]).greet().unwrap_err();
    assert!(error.to_string().contains("closed the connection"), "{error}");
}

#[test]
fn go_asks_for_block_sizes_and_collects_what_is_told() {
    let mut peer = haggling(&[
        reply(Opt::Go, rep::INFO, &[0, 1, b'x']),
        reply(Opt::Go, rep::INFO, &block_size_info([512, 4096, 1 << 20])),
        reply(Opt::Go, rep::INFO, &export_info(1 << 30, 0x103)),
        reply(Opt::Go, rep::ACK, &[]),
    ]);
    let export = peer.go("disk").unwrap().unwrap();
    assert_eq!((export.size, export.flags), (1 << 30, 0x103));
    let sizes = BlockSizes { minimum: 512, preferred: 4096, maximum: 1 << 20 };
    assert_eq!(export.block_sizes, Some(sizes));

    let mut expected = b"IHAVEOPT".to_vec();
    expected.extend([0, 0, 0, 7, 0, 0, 0, 12]);
    expected.extend(string("disk"));
    expected.extend([0, 1, 0, 3]);
    assert_eq!(peer.into_stream().sent, expected);
}

#[test]
fn an_unknown_export_is_answered_with_the_known_ones() {
    let server = |name| [string(name), b"for people".to_vec()].concat();
    let mut peer = haggling(&[
        reply(Opt::Go, rep::ERR_UNKNOWN, b"never heard of it"),
        reply(Opt::List, rep::SERVER, &server("a")),
        reply(Opt::List, rep::SERVER, &server("b")),
        reply(Opt::List, rep::ACK, &[]),
    ]);
    let error = peer.go("disk").unwrap_err().to_string();
    assert_eq!(error, "the server has no export named 'disk'; it has 'a', 'b'");
    // A server that does not list leaves the first half.
    let mut peer =
        haggling(&[reply(Opt::Go, rep::ERR_UNKNOWN, &[]), reply(Opt::List, rep::ERR_POLICY, &[])]);
    let error = peer.go("disk").unwrap_err().to_string();
    assert_eq!(error, "the server has no export named 'disk'");
}

#[test]
fn a_server_without_go_is_told_from_one_that_refuses() {
    let mut peer = haggling(&[reply(Opt::Go, rep::ERR_UNSUP, &[])]);
    assert_eq!(peer.go("").unwrap(), None);
    let mut peer = haggling(&[reply(Opt::Go, rep::ERR_POLICY, b"not you")]);
    let error = peer.go("").unwrap_err().to_string();
    assert!(error.contains("policy") && error.contains("not you"), "{error}");
}

#[test]
fn tls_required_is_recognized_on_any_option() {
    let required = |option| reply(option, rep::ERR_TLS_REQD, &[]);
    assert!(matches!(
        haggling(&[required(Opt::ExtendedHeaders)]).headers(),
        Err(Error::TlsRequired)
    ));
    assert!(matches!(haggling(&[required(Opt::Go)]).go(""), Err(Error::TlsRequired)));
    assert!(matches!(haggling(&[required(Opt::List)]).list(), Err(Error::TlsRequired)));
}

#[test]
fn a_server_without_tls_is_told() {
    for kind in [rep::ERR_UNSUP, rep::ERR_POLICY, rep::ERR_INVALID] {
        let error = haggling(&[reply(Opt::StartTls, kind, &[])]).start_tls().unwrap_err();
        assert!(error.to_string().contains("never falls back"), "{error}");
    }
}

#[test]
fn the_richest_headers_win() {
    let (extended, structured) = (Opt::ExtendedHeaders, Opt::StructuredReply);
    let (yes, no) = (rep::ACK, rep::ERR_UNSUP);
    for (answers, headers) in [
        (vec![reply(extended, yes, &[])], Headers::Extended),
        (vec![reply(extended, no, &[]), reply(structured, yes, &[])], Headers::Structured),
        (vec![reply(extended, no, &[]), reply(structured, no, &[])], Headers::Simple),
    ] {
        assert_eq!(haggling(&answers).headers().unwrap(), headers);
    }
}

#[test]
fn the_context_id_is_the_one_of_base_allocation() {
    let context = |id: u32, name: &str| [&id.to_be_bytes()[..], name.as_bytes()].concat();
    let option = Opt::SetMetaContext;
    let mut peer = haggling(&[
        reply(option, rep::META_CONTEXT, &context(3, "other:thing")),
        reply(option, rep::META_CONTEXT, &context(9, BASE_ALLOCATION)),
        reply(option, rep::ACK, &[]),
    ]);
    assert_eq!(peer.set_base_allocation("x").unwrap(), Some(9));
    let mut peer = haggling(&[reply(option, rep::ACK, &[])]);
    assert_eq!(peer.set_base_allocation("x").unwrap(), None);
    let mut peer = haggling(&[reply(option, rep::ERR_UNSUP, &[])]);
    assert_eq!(peer.set_base_allocation("x").unwrap(), None);
}

#[test]
fn malformed_replies_are_errors() {
    let huge = {
        let mut bytes = reply(Opt::Go, rep::INFO, &[]);
        bytes[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
        bytes
    };
    for answers in [
        vec![reply(Opt::List, rep::ACK, &[])],
        vec![reply(Opt::Go, rep::ACK, &[])],
        vec![reply(Opt::Go, rep::INFO, &[0])],
        vec![reply(Opt::Go, rep::INFO, &[0, 0, 1])],
        vec![reply(Opt::Go, rep::SERVER, &[])],
        vec![vec![0; 20]],
        vec![huge],
    ] {
        assert!(matches!(haggling(&answers).go(""), Err(Error::Protocol(_))), "{answers:?}");
    }
    let listed = reply(Opt::List, rep::SERVER, &[0, 0, 0, 9, b'a']);
    assert!(matches!(haggling(&[listed]).list(), Err(Error::Protocol(_))));
}

#[test]
fn block_sizes_must_make_sense() {
    let check = |minimum, preferred, maximum| {
        check_block_sizes(BlockSizes { minimum, preferred, maximum }).is_ok()
    };
    assert!(check(1, 4096, u32::MAX));
    assert!(check(4096, 65536, 33554432));
    for (minimum, preferred, maximum) in
        [(0, 4096, 1 << 20), (3, 4096, 1 << 20), (4096, 512, 1 << 20), (4096, 4096, 512)]
    {
        assert!(!check(minimum, preferred, maximum));
    }
}

#[test]
fn flags_that_contradict_each_other_are_dropped() {
    use transmission_flag as f;
    assert_eq!(sane_flags(f::SEND_FLUSH), 0);
    let read_only = f::HAS_FLAGS | f::READ_ONLY;
    assert_eq!(sane_flags(read_only | f::SEND_WRITE_ZEROES), read_only);
}

#[test]
fn what_a_server_tells_is_bounded_over_all_its_exports() {
    let context = [&7_u32.to_be_bytes()[..], &[b'x'; 60_000]].concat();
    let context = reply(Opt::ListMetaContext, rep::META_CONTEXT, &context);
    let answer = [context.repeat(250), reply(Opt::ListMetaContext, rep::ACK, &[])].concat();
    let mut peer = haggling(&vec![answer; 5]);
    for export in ["a", "b", "c", "d"] {
        assert_eq!(peer.list_meta_contexts(export).unwrap().len(), 250);
    }
    let error = peer.list_meta_contexts("e").unwrap_err();
    assert!(error.to_string().contains("has no end"), "{error}");
}
