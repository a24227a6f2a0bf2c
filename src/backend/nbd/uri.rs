//! NBD URIs: `doc/uri.md` of NetworkBlockDevice/nbd, with libnbd's additions for TLS and vsock.

use std::fmt;
use std::io;
use std::os::fd::IntoRawFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use percent_encoding::{
    AsciiSet, CONTROLS, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode,
};

use rustix::fs::{Mode, OFlags};

use super::error::Error;

/// The port that IANA gave to NBD.
pub const DEFAULT_PORT: u16 = 10809;
/// vsock(7): this machine, and the host that this virtual machine runs on.
const CID_LOCAL: u32 = 1;
const CID_HOST: u32 = 2;

/// Where an NBD export is, and how to get there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uri {
    /// The socket to connect to.
    pub address: Address,
    /// `nbds`: TLS or nothing.
    pub tls: bool,
    /// The export's name; empty for the server's default.
    pub export: String,
    /// `tls-certificates`: the directory with `ca-cert.pem` and perhaps `client-cert.pem`,
    /// `client-key.pem`.
    pub tls_certificates: Option<PathBuf>,
    /// `tls-hostname`: whom the server's certificate must name, where that is not the host (a
    /// tunnel, say).
    pub tls_hostname: Option<String>,
}

/// A socket address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `nbd://HOST:PORT`. The host is a name or an address, an IPv6 one without its brackets.
    Tcp {
        /// Name or address.
        host: String,
        /// TCP port.
        port: u16,
    },
    /// `nbd+unix:///?socket=PATH`
    Unix(PathBuf),
    /// `nbd+vsock://CID:PORT`
    Vsock {
        /// Context identifier: 1 is this machine, 2 its host, and from 3 on they are guests.
        cid: u32,
        /// vsock port.
        port: u32,
    },
}

/// What must be escaped in an export's name. `/` may stand as it is.
const IN_EXPORT: &AsciiSet =
    &CONTROLS.add(b' ').add(b'%').add(b'?').add(b'#').add(b'"').add(b'<').add(b'>').add(b'\\');
/// What must be escaped in a value of the query.
const IN_QUERY: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'/').remove(b'.').remove(b'-').remove(b'_').remove(b'~').remove(b':');

/// rustls has no keys but those of earlier sessions.
const PRE_SHARED_KEYS: &str = "TLS with pre-shared keys is not supported: use certificates \
     (tls-certificates=DIR), or have nbdkit speak TLS: diskfuse [ nbdkit nbd hostname=HOST \
     tls=require tls-psk=FILE tls-username=USER ] MOUNTPOINT";

fn invalid(reason: impl Into<String>) -> Error {
    Error::Uri(reason.into())
}

fn decode(text: &str, what: &str) -> Result<String, Error> {
    let bytes = text.as_bytes();
    // The crate leaves a broken escape as it is; a name that is half escaped deserves an error.
    for (at, _) in text.match_indices('%') {
        if !bytes.get(at + 1..at + 3).is_some_and(|d| d.iter().all(u8::is_ascii_hexdigit)) {
            return Err(invalid(format!("{what} has a '%' that no two hex digits follow")));
        }
    }
    let text = percent_decode_str(text)
        .decode_utf8()
        .map_err(|_| invalid(format!("{what} is not UTF-8")))?;
    if text.contains('\0') {
        return Err(invalid(format!("{what} has a NUL byte")));
    }
    Ok(text.into_owned())
}

impl Uri {
    /// Whether `text` begins like an NBD URI: tells a remote disk from the path of a local one.
    pub fn is_nbd(text: &str) -> bool {
        ["nbd:", "nbds:", "nbd+unix:", "nbds+unix:", "nbd+vsock:", "nbds+vsock:"]
            .iter()
            .any(|scheme| text.get(..scheme.len()).is_some_and(|t| t.eq_ignore_ascii_case(scheme)))
    }

    /// The name that the server's certificate must carry.
    pub fn server_name(&self) -> &str {
        match (&self.tls_hostname, &self.address) {
            (Some(name), _) => name,
            (None, Address::Tcp { host, .. }) => host,
            (None, Address::Unix(_) | Address::Vsock { .. }) => "localhost",
        }
    }
}

impl FromStr for Uri {
    type Err = Error;

    fn from_str(text: &str) -> Result<Uri, Error> {
        let (scheme, rest) = text
            .split_once("://")
            .ok_or_else(|| invalid("there is no '://': an NBD URI looks like nbd://host/export"))?;
        let scheme = scheme.to_ascii_lowercase();
        let (tls, transport) = match scheme.split_once('+').unwrap_or((&scheme, "tcp")) {
            ("nbd", transport) => (false, transport),
            ("nbds", transport) => (true, transport),
            _ => return Err(invalid(format!("'{scheme}' is not an NBD scheme"))),
        };
        if rest.contains('#') {
            return Err(invalid("a '#' has no meaning here: write %23 if it is part of the name"));
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        if authority.contains('@') {
            return Err(invalid(format!(
                "a user name goes with pre-shared keys, and {PRE_SHARED_KEYS}"
            )));
        }
        let query = Query::parse(query)?;
        if query.socket.is_some() && transport != "unix" {
            return Err(invalid(format!("'socket' goes with nbd+unix, not with {scheme}")));
        }
        if !tls && (query.tls_certificates.is_some() || query.tls_hostname.is_some()) {
            return Err(invalid("'tls-certificates' and 'tls-hostname' go with nbds"));
        }
        let mut tls_hostname = query.tls_hostname;
        let address = match transport {
            "tcp" => {
                let (host, port) = split_port(authority)?;
                if host.is_empty() {
                    return Err(invalid("the host is missing: nbd://host/export"));
                }
                let port = port.unwrap_or(DEFAULT_PORT.into());
                let port = u16::try_from(port).map_err(|_| no_port(port))?;
                Address::Tcp { host: decode(host, "the host")?, port }
            }
            "unix" => {
                let path = query.socket.filter(|path| !path.is_empty()).ok_or_else(|| {
                    invalid("the socket is missing: nbd+unix:///export?socket=/path/to/socket")
                })?;
                if !authority.is_empty() {
                    // uri.md leaves its meaning open; the name on the certificate is the useful
                    // one.
                    if !tls {
                        return Err(invalid("nbd+unix has no host: write nbd+unix:///export"));
                    }
                    tls_hostname.get_or_insert(decode(authority, "the host")?);
                }
                Address::Unix(path.into())
            }
            "vsock" => {
                let (cid, port) = split_port(authority)?;
                let cid = match cid {
                    // As libnbd has it.
                    "" => CID_HOST,
                    cid => number(cid).filter(|cid| *cid >= CID_LOCAL).ok_or_else(|| {
                        invalid(format!(
                            "'{cid}' is not a context identifier, which {scheme} needs: 1 for this \
                             machine, 2 for its host, from 3 on for guests"
                        ))
                    })?,
                };
                Address::Vsock { cid, port: port.unwrap_or(DEFAULT_PORT.into()) }
            }
            _ => return Err(invalid(format!("'{scheme}' is not an NBD scheme"))),
        };
        let export = decode(path, "the export name")?;
        if export.len() > 4096 {
            return Err(invalid("the export name is longer than the protocol's 4096 bytes"));
        }
        Ok(Uri { address, tls, export, tls_certificates: query.tls_certificates, tls_hostname })
    }
}

#[derive(Default)]
struct Query {
    socket: Option<String>,
    tls_certificates: Option<PathBuf>,
    tls_hostname: Option<String>,
}

impl Query {
    fn parse(text: &str) -> Result<Query, Error> {
        let mut query = Query::default();
        for pair in text.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = decode(value, &format!("'{key}'"))?;
            let twice = match key {
                "socket" => query.socket.replace(value).is_some(),
                "tls-certificates" => query.tls_certificates.replace(value.into()).is_some(),
                "tls-hostname" => query.tls_hostname.replace(value).is_some(),
                "tls-psk-file" => {
                    return Err(invalid(format!("'tls-psk-file': {PRE_SHARED_KEYS}")));
                }
                _ => {
                    return Err(invalid(format!(
                        "the key '{key}' is unknown: socket, tls-certificates and tls-hostname are known"
                    )));
                }
            };
            if twice {
                return Err(invalid(format!("the key '{key}' is given twice")));
            }
        }
        Ok(query)
    }
}

/// Digits only, and not the one that vsock(7) has for "any".
fn number(digits: &str) -> Option<u32> {
    let is_plain = digits.bytes().all(|byte| byte.is_ascii_digit());
    digits.parse().ok().filter(|number| is_plain && *number != u32::MAX)
}

fn no_port(port: impl fmt::Display) -> Error {
    invalid(format!("'{port}' is not a port"))
}

/// Splits `host:port`, `[v6]:port`, `host` or `[v6]`.
fn split_port(authority: &str) -> Result<(&str, Option<u32>), Error> {
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let (host, rest) = rest
            .split_once(']')
            .ok_or_else(|| invalid("the ']' of the IPv6 address is missing"))?;
        if host.parse::<std::net::Ipv6Addr>().is_err() && !host.contains('%') {
            return Err(invalid(format!("'{host}' is not an IPv6 address")));
        }
        (host, rest)
    } else {
        match authority.split_once(':') {
            Some((_, rest)) if rest.contains(':') => {
                return Err(invalid("an IPv6 address needs brackets: nbd://[::1]/export"));
            }
            Some((host, _)) => authority.split_at(host.len()),
            None => (authority, ""),
        }
    };
    match port.strip_prefix(':') {
        None if port.is_empty() => Ok((host, None)),
        Some("") => Ok((host, None)),
        Some(digits) => match number(digits) {
            None | Some(0) => Err(no_port(digits)),
            port => Ok((host, port)),
        },
        None => Err(invalid(format!("'{port}' follows the ']' of the IPv6 address"))),
    }
}

impl Uri {
    /// The path of its Unix socket.
    pub fn socket(&self) -> Option<&PathBuf> {
        match &self.address {
            Address::Unix(path) => Some(path),
            Address::Tcp { .. } | Address::Vsock { .. } => None,
        }
    }

    /// The same server, if the working folder changes: a relative path of a socket is made
    /// absolute.
    pub fn from_anywhere(&self) -> io::Result<Uri> {
        let address = match &self.address {
            Address::Unix(path) => Address::Unix(socket_from_anywhere(path)?),
            address => address.clone(),
        };
        Ok(Uri { address, ..self.clone() })
    }
}

fn socket_from_anywhere(path: &Path) -> io::Result<PathBuf> {
    // sun_path of unix(7), with the zero byte at its end.
    const LONGEST: usize = 108;
    let absolute = std::path::absolute(path)?;
    if absolute.as_os_str().len() < LONGEST {
        return Ok(absolute);
    }
    let (Some(folder), Some(name)) = (absolute.parent(), absolute.file_name()) else {
        return Ok(absolute);
    };
    // One that is never closed, for the life of the process.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::open(folder, flags, Mode::empty())?.into_raw_fd();
    Ok(Path::new(&format!("/proc/self/fd/{folder}")).join(name))
}

impl fmt::Display for Uri {
    /// The canonical form: no default port, no empty query.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.tls { "nbds" } else { "nbd" })?;
        let mut query = Vec::new();
        match &self.address {
            Address::Tcp { host, port } => {
                if host.contains(':') {
                    write!(f, "://[{}]", host.replace('%', "%25"))?;
                } else {
                    write!(f, "://{host}")?;
                }
                if *port != DEFAULT_PORT {
                    write!(f, ":{port}")?;
                }
            }
            Address::Unix(path) => {
                f.write_str("+unix://")?;
                query.push(("socket", path.to_string_lossy()));
            }
            Address::Vsock { cid, port } => {
                write!(f, "+vsock://{cid}")?;
                if *port != u32::from(DEFAULT_PORT) {
                    write!(f, ":{port}")?;
                }
            }
        }
        write!(f, "/{}", utf8_percent_encode(&self.export, IN_EXPORT))?;
        if let Some(directory) = &self.tls_certificates {
            query.push(("tls-certificates", directory.to_string_lossy()));
        }
        if let Some(name) = &self.tls_hostname {
            query.push(("tls-hostname", name.as_str().into()));
        }
        for (at, (key, value)) in query.iter().enumerate() {
            let separator = if at == 0 { '?' } else { '&' };
            write!(f, "{separator}{key}={}", utf8_percent_encode(value, IN_QUERY))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp { host: host.into(), port }
    }

    fn parse(text: &str) -> Uri {
        text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
    }

    #[test]
    fn addresses() {
        for (text, address, tls) in [
            ("nbd://host", tcp("host", 10809), false),
            ("nbd://host/", tcp("host", 10809), false),
            ("NBD://host:/", tcp("host", 10809), false),
            ("nbd://10.0.0.1:99/", tcp("10.0.0.1", 99), false),
            ("nbds://[::1]/", tcp("::1", 10809), true),
            ("nbds://[fe80::1]:7/x", tcp("fe80::1", 7), true),
            ("nbd+unix:///?socket=/run/a%20b", Address::Unix("/run/a b".into()), false),
            ("nbds+unix:///x?socket=s", Address::Unix("s".into()), true),
            ("nbd+unix://?socket=s", Address::Unix("s".into()), false),
            ("nbd+vsock://2/", Address::Vsock { cid: 2, port: 10809 }, false),
            ("nbd+vsock:///x", Address::Vsock { cid: 2, port: 10809 }, false),
            ("nbd+vsock://:7/x", Address::Vsock { cid: 2, port: 7 }, false),
            ("NBD+VSOCK://1:/", Address::Vsock { cid: 1, port: 10809 }, false),
            ("nbds+vsock://3:70000/", Address::Vsock { cid: 3, port: 70000 }, true),
        ] {
            let uri = parse(text);
            assert_eq!((&uri.address, uri.tls), (&address, tls), "{text}");
        }
    }

    #[test]
    fn export_names_are_decoded() {
        for (text, export) in [
            ("nbd://h", ""),
            ("nbd://h/", ""),
            ("nbd://h/a", "a"),
            ("nbd://h//a", "/a"),
            ("nbd://h/a/b", "a/b"),
            ("nbd://h/a%2fb%20%C3%A4+", "a/b ä+"),
            ("nbd+unix:///a%3Fb?socket=s", "a?b"),
        ] {
            assert_eq!(parse(text).export, export, "{text}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            ("/dev/sda", "://"),
            ("http://host/", "'http'"),
            ("nbd+tls://host/", "'nbd+tls'"),
            ("nbd:///x", "host is missing"),
            ("nbd://h:0/", "'0'"),
            ("nbd://h:99999/", "'99999'"),
            ("nbd://h:+1/", "'+1'"),
            ("nbd://::1/", "brackets"),
            ("nbd://[::1/", "']'"),
            ("nbd://[host]/", "IPv6"),
            ("nbd://[::1]x/", "'x'"),
            ("nbd://u@h/", "pre-shared"),
            ("nbd+unix:///x", "socket is missing"),
            ("nbd+unix:///x?socket=", "socket is missing"),
            ("nbd+unix://h/x?socket=s", "no host"),
            ("nbd://h/?socket=s", "nbd+unix"),
            ("nbd://h/?tls-certificates=d", "nbds"),
            ("nbds://h/?tls-psk-file=f", "tls-psk=FILE"),
            ("nbds://u@h/?tls-psk-file=f", "tls-username=USER"),
            ("nbds://h/?tls-hostname=a&tls-hostname=b", "twice"),
            ("nbd://h/%zz", "hex"),
            ("nbd://h/%ff", "UTF-8"),
            ("nbd://h/%00", "NUL"),
            ("nbd://h/a#b", "%23"),
            ("nbd+vsock://h/", "'h' is not a context identifier"),
            ("nbd+vsock://0/", "context identifier"),
            ("nbd+vsock://+2/", "context identifier"),
            ("nbds+vsock://4294967295/", "nbds+vsock"),
            ("nbd+vsock://2:4294967295/", "not a port"),
            ("nbd+vsock://2:0/", "not a port"),
            ("nbd+vsock://2/?socket=s", "nbd+unix"),
            ("nbd+vsock://2/?tls-hostname=a", "nbds"),
        ] {
            let error = text.parse::<Uri>().expect_err(text).to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn relative_sockets_are_found_from_anywhere() {
        let here = std::env::current_dir().unwrap();
        let socket = |text: &str| parse(text).from_anywhere().unwrap().socket().cloned();
        assert_eq!(socket("nbd+unix:///?socket=s"), Some(here.join("s")));
        assert_eq!(socket("nbd+unix:///?socket=/run/s"), Some("/run/s".into()));
        assert_eq!(socket("nbd://host/"), None);
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("d".repeat(100));
        std::fs::create_dir(&deep).unwrap();
        std::fs::write(deep.join("s"), "found").unwrap();
        let short = socket_from_anywhere(&deep.join("s")).unwrap();
        assert!(short.as_os_str().len() < 100, "{short:?}");
        assert_eq!(std::fs::read(short).unwrap(), b"found");
    }

    #[test]
    fn canonical_forms_parse_to_the_same() {
        for (text, canonical) in [
            ("nbd://host", "nbd://host/"),
            ("nbd://host:10809/%61", "nbd://host/a"),
            ("nbd://[::1]:5/a%20b", "nbd://[::1]:5/a%20b"),
            ("nbd://h/%25%3f", "nbd://h/%25%3F"),
            ("nbd+unix:///x?socket=/a%26b", "nbd+unix:///x?socket=/a%26b"),
            (
                "nbds+unix://name/?tls-certificates=/etc/pki&socket=s",
                "nbds+unix:///?socket=s&tls-certificates=/etc/pki&tls-hostname=name",
            ),
            ("nbd+vsock://2:10809", "nbd+vsock://2/"),
            ("nbds+vsock://:1/a?tls-hostname=b", "nbds+vsock://2:1/a?tls-hostname=b"),
        ] {
            let uri = parse(text);
            assert_eq!(uri.to_string(), canonical);
            assert_eq!(parse(canonical), uri);
        }
    }

    #[test]
    fn schemes_are_told_from_paths() {
        assert!(Uri::is_nbd("nbd://h/"));
        assert!(Uri::is_nbd("NBDS+unix:///"));
        assert!(!Uri::is_nbd("nbd.img"));
        assert!(!Uri::is_nbd("/x/nbd:"));
        assert!(!Uri::is_nbd("ä"));
    }

    #[test]
    fn the_certificate_must_name_the_host() {
        assert_eq!(parse("nbds://a.example/").server_name(), "a.example");
        assert_eq!(parse("nbds://h/?tls-hostname=b").server_name(), "b");
        assert_eq!(parse("nbds+unix:///?socket=s").server_name(), "localhost");
        assert_eq!(parse("nbds+unix://c/?socket=s").server_name(), "c");
        assert_eq!(parse("nbds+vsock://2/").server_name(), "localhost");
        assert_eq!(parse("nbds+vsock://2/?tls-hostname=c").server_name(), "c");
    }
}
