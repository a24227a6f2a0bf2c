//! TLS against nbdkit and qemu-nbd, with certificates made for the test.

use std::process::{Command, Stdio};
use std::time::Duration;

use super::super::{Error, NbdBackend, Uri};
use super::commands::model_tests;
use super::servers::{Directory, Server, nbdkit, nbdkit_tcp, qemu_nbd};
use super::{on_lane, options};
use crate::backend::{Backend, Lane};

/// Two authorities, `ca` and `other`; `server` has certificates of the first for 127.0.0.1 and
/// localhost, `wrong` for another name. `client` and `stranger` are clients of the one and the
/// other.
struct Certificates(Directory);

impl Certificates {
    /// `None` if openssl is missing.
    fn new() -> Option<Certificates> {
        let certificates = Certificates(Directory::new());
        for authority in ["ca", "other"] {
            certificates.openssl(&format!(
                "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 \
                 -subj /CN={authority} -keyout {authority}-key.pem -out {authority}-cert.pem \
                 -addext basicConstraints=critical,CA:TRUE"
            ))?;
        }
        for (name, authority, extension) in [
            ("server", "ca", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            ("wrong", "ca", "subjectAltName=DNS:elsewhere.example"),
            ("client", "ca", "extendedKeyUsage=clientAuth"),
            ("stranger", "other", "extendedKeyUsage=clientAuth"),
        ] {
            certificates.openssl(&format!(
                "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 \
                 -subj /CN={name} -keyout {name}-key.pem -out {name}-cert.pem \
                 -CA {authority}-cert.pem -CAkey {authority}-key.pem -addext {extension} \
                 -addext basicConstraints=critical,CA:FALSE"
            ))?;
        }
        Some(certificates)
    }

    fn openssl(&self, arguments: &str) -> Option<()> {
        let mut command = Command::new("openssl");
        command.args(arguments.split_whitespace()).current_dir(&self.0.0);
        match command.stdout(Stdio::null()).stderr(Stdio::piped()).output() {
            Ok(output) => {
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
                Some(())
            }
            Err(_) => {
                println!("skipped: openssl is not installed");
                None
            }
        }
    }

    /// A directory as servers and clients want it: (from, to) pairs of file names.
    fn directory(&self, name: &str, files: &[(&str, &str)]) -> String {
        let directory = self.0.path(name);
        std::fs::create_dir_all(&directory).unwrap();
        for (from, to) in files {
            std::fs::copy(self.0.path(from), format!("{directory}/{to}")).unwrap();
        }
        directory
    }

    fn for_server(&self, name: &str) -> String {
        self.directory(
            &format!("for-{name}"),
            &[
                ("ca-cert.pem", "ca-cert.pem"),
                (&format!("{name}-cert.pem"), "server-cert.pem"),
                (&format!("{name}-key.pem"), "server-key.pem"),
            ],
        )
    }

    fn for_client(&self, authority: &str, client: Option<&str>) -> String {
        let directory = format!("for-client-{authority}-{}", client.unwrap_or("none"));
        let path = self.directory(&directory, &[(&format!("{authority}-cert.pem"), "ca-cert.pem")]);
        if let Some(client) = client {
            self.directory(
                &directory,
                &[
                    (&format!("{client}-cert.pem"), "client-cert.pem"),
                    (&format!("{client}-key.pem"), "client-key.pem"),
                ],
            );
        }
        path
    }
}

fn nbds(server: &Server, export: &str, certificates: &str) -> String {
    let uri = server.uri(export).replacen("nbd", "nbds", 1);
    let separator = if uri.contains('?') { '&' } else { '?' };
    format!("{uri}{separator}tls-certificates={certificates}")
}

/// Reads and writes small and large pieces, many at once.
fn works(uri: &str) {
    let uri: Uri = uri.parse().unwrap();
    let backend = NbdBackend::connect(&uri, &options()).unwrap_or_else(|e| panic!("{uri}: {e}"));
    on_lane(&backend, async |lane, executor| {
        let data: Vec<u8> = (0..3_000_000_u32).map(|n| (n * 7 / 3) as u8).collect();
        lane.write(1000, &data, true).await.unwrap();
        let mut buf = vec![0; data.len()];
        lane.read(1000, &mut buf).await.unwrap();
        assert!(buf == data);
        let reads: Vec<_> = (0..64_usize)
            .map(|n| {
                let lane = lane.clone();
                let expected = data[n * 40_000..n * 40_000 + 1000 * n].to_vec();
                executor.spawn(async move {
                    let mut buf = vec![0; expected.len()];
                    lane.read(1000 + n as u64 * 40_000, &mut buf).await.unwrap();
                    assert!(buf == expected);
                })
            })
            .collect();
        for read in reads {
            read.await;
        }
        lane.write(0, &[1], false).await.unwrap();
    });
    backend.last_flush(Duration::ZERO).unwrap();
}

#[track_caller]
fn fails(uri: &str, parts: &[&str]) -> Error {
    let uri: Uri = uri.parse().unwrap();
    let error = NbdBackend::connect(&uri, &options()).err().unwrap_or_else(|| panic!("{uri}"));
    for part in parts {
        assert!(error.to_string().contains(part), "'{part}' is missing: {error}");
    }
    error
}

#[test]
fn nbdkit_with_tls() {
    let Some(certificates) = Certificates::new() else { return };
    let directory = format!("--tls-certificates={}", certificates.for_server("server"));
    let arguments = ["--tls=require", &directory, "memory", "16M"];
    let Some(server) = nbdkit_tcp(&arguments) else { return };
    let good = certificates.for_client("ca", None);
    works(&nbds(&server, "", &good));
    fails(&server.uri(""), &["requires TLS", "nbds://"]);
    let unknown = certificates.for_client("other", None);
    fails(&nbds(&server, "", &unknown), &["unknown authority", "ca-cert.pem"]);
    let name = format!("{}&tls-hostname=elsewhere.example", nbds(&server, "", &good));
    fails(&name, &["not for 'elsewhere.example'"]);
    fails(&nbds(&server, "", "/nonexistent"), &["/nonexistent/ca-cert.pem"]);

    let Some(server) = nbdkit(&arguments) else { return };
    works(&nbds(&server, "", &good));
}

#[test]
fn model_inside_tls() {
    let Some(certificates) = Certificates::new() else { return };
    let directory = format!("--tls-certificates={}", certificates.for_server("server"));
    for mode in ["auto", "disable"] {
        let mode = format!("multi-conn-mode={mode}");
        let filter = ["--tls=require", &directory, "--filter=multi-conn", "memory", "16M", &mode];
        let Some(server) = nbdkit_tcp(&filter) else { return };
        model_tests(&nbds(&server, "", &certificates.for_client("ca", None)), 3);
    }
}

#[test]
fn a_certificate_for_another_host() {
    let Some(certificates) = Certificates::new() else { return };
    let directory = format!("--tls-certificates={}", certificates.for_server("wrong"));
    let Some(server) = nbdkit_tcp(&["--tls=require", &directory, "memory", "16M"]) else { return };
    let uri = nbds(&server, "", &certificates.for_client("ca", None));
    fails(&uri, &["not for '127.0.0.1'"]);
    works(&format!("{uri}&tls-hostname=elsewhere.example"));
}

#[test]
fn client_certificates() {
    let Some(certificates) = Certificates::new() else { return };
    let directory = format!("--tls-certificates={}", certificates.for_server("server"));
    let arguments = ["--tls=require", "--tls-verify-peer", &directory, "memory", "16M"];
    let Some(server) = nbdkit_tcp(&arguments) else { return };
    works(&nbds(&server, "", &certificates.for_client("ca", Some("client"))));
    for client in [None, Some("stranger")] {
        let uri = nbds(&server, "", &certificates.for_client("ca", client));
        fails(&uri, &["client-cert.pem"]);
    }
}

#[test]
fn qemu_nbd_with_tls() {
    let Some(certificates) = Certificates::new() else { return };
    let object = format!(
        "--object=tls-creds-x509,id=tls,endpoint=server,verify-peer=no,dir={}",
        certificates.for_server("server")
    );
    let arguments = [&object, "--tls-creds=tls", "--shared=4"];
    let Some(server) = qemu_nbd(16 << 20, &arguments) else { return };
    let good = certificates.for_client("ca", None);
    works(&nbds(&server, "disk", &good));
    fails(&server.uri("disk"), &["requires TLS"]);
    fails(&nbds(&server, "disk", &certificates.for_client("other", None)), &["unknown authority"]);
    fails(&nbds(&server, "nothing", &good), &["no export named 'nothing'", "'disk'"]);
}
