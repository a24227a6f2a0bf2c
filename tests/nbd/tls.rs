//! TLS: served where everything is right, refused with the reason where something is wrong.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use libtest_mimic::Trial;

use crate::common::nbd::{Address, Server};
use crate::common::sandbox::Sandbox;
use crate::common::suite::trial;
use crate::common::{noise, program, succeed};
use crate::refusals::assert_refused;
use crate::{Bench, SIZE, in_memory, open};

/// Two authorities, `ca` and `other`. Of the first are `server`, which is `host`, `wrong`, which is
/// another host, and `client`; of the other is `stranger`, a client.
pub struct Certificates(Sandbox);

impl Certificates {
    pub fn new(host: &str) -> Certificates {
        let certificates = Certificates(in_memory());
        for authority in ["ca", "other"] {
            certificates.make(authority, None, "basicConstraints=critical,CA:TRUE");
        }
        let host = format!("subjectAltName=IP:{host}");
        certificates.make("server", Some("ca"), &host);
        certificates.make("wrong", Some("ca"), "subjectAltName=DNS:elsewhere.example");
        certificates.make("client", Some("ca"), "extendedKeyUsage=clientAuth");
        certificates.make("stranger", Some("other"), "extendedKeyUsage=clientAuth");
        certificates
    }

    fn make(&self, name: &str, authority: Option<&str>, extension: &str) {
        let mut words = format!(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN={name} \
             -keyout {name}-key.pem -out {name}-cert.pem -addext {extension}"
        );
        if let Some(authority) = authority {
            words += &format!(
                " -CA {authority}-cert.pem -CAkey {authority}-key.pem \
                 -addext basicConstraints=critical,CA:FALSE"
            );
        }
        succeed(program("openssl", words.split_whitespace()).current_dir(self.0.path()));
    }

    /// A folder as servers and clients want it; `role` is `server` or `client`.
    pub fn folder(&self, role: &str, authority: &str, name: Option<&str>) -> String {
        let path = self.0.join(&format!("{role}-{authority}-{}", name.unwrap_or("nobody")));
        fs::create_dir_all(&path).unwrap();
        let copy = |from: String, to: String| {
            fs::copy(self.0.join(&from), Path::new(&path).join(to)).unwrap();
        };
        copy(format!("{authority}-cert.pem"), "ca-cert.pem".into());
        for part in ["cert", "key"] {
            if let Some(name) = name {
                copy(format!("{name}-{part}.pem"), format!("{role}-{part}.pem"));
            }
        }
        path.to_str().expect("UTF-8").into()
    }
}

/// A server of a TLS test, on TCP.
#[derive(Clone, Copy)]
enum Program {
    Nbdkit,
    QemuNbd,
}

/// What the server wants.
#[derive(Clone, Copy, Default)]
struct Setup {
    /// Whose certificate it has; none: it has no TLS.
    name: Option<&'static str>,
    /// It wants to know its clients.
    verifies: bool,
}

impl Program {
    fn start(
        self,
        setup: Setup,
        certificates: &Certificates,
        address: &Address,
        disk: &Path,
    ) -> Server {
        let folder = setup.name.map(|name| certificates.folder("server", "ca", Some(name)));
        match self {
            Program::Nbdkit => {
                let mut words = Vec::new();
                match folder {
                    Some(folder) => {
                        words.extend([
                            "--tls=require".into(),
                            format!("--tls-certificates={folder}"),
                        ]);
                    }
                    None => words.push("--tls=off".into()),
                }
                words.extend(setup.verifies.then(|| "--tls-verify-peer".into()));
                words.extend(["file".into(), disk.display().to_string()]);
                Server::nbdkit(address, words)
            }
            Program::QemuNbd => {
                let Address::Tcp(host) = address else { unreachable!("TLS is over TCP here") };
                let mut words = vec!["--bind".into(), host.to_string()];
                words.extend(["--format=raw", "--persistent", "--shared=8"].map(String::from));
                if let Some(folder) = folder {
                    let verify = if setup.verifies { "yes" } else { "no" };
                    words.push(format!(
                        "--object=tls-creds-x509,id=tls,endpoint=server,verify-peer={verify},dir={folder}"
                    ));
                    words.push("--tls-creds=tls".into());
                }
                words.push(disk.display().to_string());
                let mut command = std::process::Command::new("qemu-nbd");
                Server::start(command.args(words), address)
            }
        }
    }

    fn name(self) -> &'static str {
        match self {
            Program::Nbdkit => "nbdkit",
            Program::QemuNbd => "qemu-nbd",
        }
    }
}

fn host(address: &Address) -> String {
    match address {
        Address::Tcp(host) => host.to_string(),
        Address::Unix(_) => unreachable!("TLS is over TCP here"),
    }
}

fn is_served(bench: &Bench, program: Program) {
    let address = Address::tcp();
    let certificates = Certificates::new(&host(&address));
    let mut bytes = noise(1, SIZE);
    let disk = bench.disk(&bytes);
    let uri = address.uri("").replace("nbd://", "nbds://");
    for (verifies, client) in [(false, None), (true, Some("client"))] {
        let setup = Setup { name: Some("server"), verifies };
        let _server = program.start(setup, &certificates, &address, &disk);
        let folder = certificates.folder("client", "ca", client);
        let mut export = bench
            .try_export(&uri, &["--tls-certificates", &folder])
            .unwrap_or_else(|ended| panic!("{}: {}", ended.status, ended.log));
        assert!(fs::read(export.file()).unwrap() == bytes);
        std::thread::scope(|scope| {
            for (n, part) in bytes.chunks_mut(SIZE / 4).enumerate() {
                let file = open(export.file(), 0);
                scope.spawn(move || {
                    let new = noise(n as u64 + 9, 700_001);
                    part[100..100 + new.len()].copy_from_slice(&new);
                    file.write_all_at(&new, (n * SIZE / 4 + 100) as u64).unwrap();
                    file.sync_all().unwrap();
                });
            }
        });
        assert!(fs::read(export.file()).unwrap() == bytes);
        export.stop(libc::SIGTERM).assert(0, &[]);
        assert!(fs::read(&disk).unwrap() == bytes);
    }
}

pub fn nbdkit_is_served(bench: &Bench) {
    is_served(bench, Program::Nbdkit);
}

pub fn qemu_nbd_is_served(bench: &Bench) {
    is_served(bench, Program::QemuNbd);
}

/// A client that is refused, or refuses.
struct Refused {
    name: &'static str,
    server: Setup,
    scheme: &'static str,
    /// What it trusts, and who it says it is; none: no certificates.
    client: Option<(&'static str, Option<&'static str>)>,
    /// In the message
    says: &'static [&'static str],
}

const GOOD: Setup = Setup { name: Some("server"), verifies: false };
const STRICT: Setup = Setup { verifies: true, ..GOOD };

const REFUSED: &[Refused] = &[
    Refused {
        name: "certificate_of_another_host",
        server: Setup { name: Some("wrong"), ..GOOD },
        scheme: "nbds://",
        client: Some(("ca", None)),
        says: &["TLS failed", "certificate", "not for"],
    },
    Refused {
        name: "unknown_authority",
        server: GOOD,
        scheme: "nbds://",
        client: Some(("other", None)),
        says: &["TLS failed", "unknown authority", "ca-cert.pem"],
    },
    Refused {
        name: "authority_unknown_to_the_system",
        server: GOOD,
        scheme: "nbds://",
        client: None,
        says: &["unknown authority"],
    },
    Refused {
        name: "plain_server",
        server: Setup { name: None, verifies: false },
        scheme: "nbds://",
        client: Some(("ca", None)),
        says: &["no TLS", "never falls back"],
    },
    Refused {
        name: "plain_client",
        server: GOOD,
        scheme: "nbd://",
        client: None,
        says: &["requires TLS", "nbds://"],
    },
    Refused {
        name: "client_without_certificate",
        server: STRICT,
        scheme: "nbds://",
        client: Some(("ca", None)),
        says: &["client-cert.pem"],
    },
    Refused {
        name: "client_of_another_authority",
        server: STRICT,
        scheme: "nbds://",
        client: Some(("ca", Some("stranger"))),
        says: &["client-cert.pem"],
    },
];

impl Refused {
    fn test(&self, program: Program) {
        let address = Address::tcp();
        let sandbox = in_memory();
        let certificates = Certificates::new(&host(&address));
        let disk = sandbox.join("disk.img");
        fs::write(&disk, noise(1, 65_536)).unwrap();
        let _server = program.start(self.server, &certificates, &address, &disk);
        let mut words = vec![address.uri("").replace("nbd://", self.scheme)];
        if let Some((authority, client)) = self.client {
            let folder = certificates.folder("client", authority, client);
            words.extend(["--tls-certificates".into(), folder]);
        }
        assert_refused(&words, 3, self.says);
    }
}

pub fn trials() -> Vec<Trial> {
    let trials = REFUSED.iter().flat_map(|refused| {
        [Program::Nbdkit, Program::QemuNbd].map(|program| {
            let name = format!("tls/{}/{}", program.name(), refused.name);
            let needs = vec!["nbd", "openssl", program.name()];
            trial(name, needs, move || refused.test(program))
        })
    });
    trials.collect()
}
