//! TLS through rustls, with ring's cryptography.
//!
//! The server's certificate is verified against the system's roots or the `ca-cert.pem` of a
//! directory laid out as libnbd and nbdkit have it; there is no switch to skip that. A client
//! certificate is sent if the directory has one.

use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{CertificateError, ClientConfig, ClientConnection, RootCertStore};

use super::error::Error;
use super::handshake::stream_error;

/// Reads the certificates: `directory` has `ca-cert.pem` and perhaps `client-cert.pem` with
/// `client-key.pem`; without one the system's roots count and no client certificate is sent.
pub fn client_config(directory: Option<&Path>) -> Result<Arc<ClientConfig>, Error> {
    let roots = match directory {
        Some(directory) => roots_in(directory)?,
        None => system_roots()?,
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| Error::Tls(e.to_string()))?
        .with_root_certificates(roots);
    let certificate = directory.map(|directory| directory.join("client-cert.pem"));
    let config = match certificate.filter(|path| path.exists()) {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let key_path = path.with_file_name("client-key.pem");
            let chain = certificates(&path)?;
            let key = PrivateKeyDer::from_pem_file(&key_path)
                .map_err(|e| unusable(&key_path, format!("no usable private key: {e}")))?;
            builder
                .with_client_auth_cert(chain, key)
                .map_err(|e| unusable(&path, format!("does not go with its key: {e}")))?
        }
    };
    Ok(Arc::new(config))
}

fn unusable(path: &Path, reason: String) -> Error {
    Error::Certificates { path: path.into(), reason }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let certificates: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|e| unusable(path, format!("no usable certificate: {e}")))?;
    if certificates.is_empty() {
        return Err(unusable(path, "there is no certificate in it".into()));
    }
    Ok(certificates)
}

fn roots_in(directory: &Path) -> Result<RootCertStore, Error> {
    let path = directory.join("ca-cert.pem");
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&path)? {
        roots.add(certificate).map_err(|e| unusable(&path, e.to_string()))?;
    }
    Ok(roots)
}

fn system_roots() -> Result<RootCertStore, Error> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(found.certs);
    if added == 0 {
        return Err(Error::Tls(
            "the system has no root certificates: install ca-certificates, or give a directory \
             with ca-cert.pem (tls-certificates)"
                .into(),
        ));
    }
    Ok(roots)
}

/// Runs the TLS handshake on `stream`, blocking, until the server is known to be `server_name`.
pub fn connect(
    config: Arc<ClientConfig>,
    server_name: &str,
    stream: &mut (impl Read + Write),
    time_limit: Duration,
) -> Result<ClientConnection, Error> {
    let name = ServerName::try_from(server_name.to_owned()).map_err(|_| {
        Error::Tls(format!("'{server_name}' is no host name that a certificate can have"))
    })?;
    let mut session = ClientConnection::new(config, name).map_err(|e| Error::Tls(e.to_string()))?;
    while session.is_handshaking() {
        session.complete_io(stream).map_err(|error| {
            match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
                Some(inner) => explain(inner, server_name),
                None => stream_error(error, time_limit),
            }
        })?;
    }
    Ok(session)
}

/// The reason in the user's terms, with the cure where there is one.
pub fn explain(error: &rustls::Error, server_name: &str) -> Error {
    use rustls::{AlertDescription, Error as E};
    Error::Tls(match error {
        E::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => format!(
            "the server's certificate is not for '{server_name}': use the name that it has, or \
             tls-hostname=NAME in the URI"
        ),
        E::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "the server's certificate comes from an unknown authority: give a directory with its \
             ca-cert.pem (tls-certificates)"
                .into()
        }
        E::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        ) => "the server's certificate has expired".into(),
        E::InvalidCertificate(
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. },
        ) => "the server's certificate is not valid yet: is the clock right?".into(),
        E::InvalidCertificate(reason) => format!("the server's certificate is no good: {reason}"),
        E::AlertReceived(
            AlertDescription::CertificateRequired
            | AlertDescription::BadCertificate
            | AlertDescription::UnknownCA
            | AlertDescription::AccessDenied,
        ) => format!("{CLIENT_CERTIFICATE} ({error})"),
        other => other.to_string(),
    })
}

const CLIENT_CERTIFICATE: &str = "the server does not accept this client's certificate, or misses one: \
                                  put client-cert.pem and client-key.pem beside ca-cert.pem";

/// The first error inside TLS. In TLS 1.3 the client learns only here that the server did not like
/// its certificate, and some servers tell it by hanging up.
pub fn explain_hang_up(error: Error) -> Error {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionReset, UnexpectedEof};
    match error {
        Error::Broken(e)
            if matches!(e.kind(), UnexpectedEof | ConnectionReset | ConnectionAborted) =>
        {
            Error::Tls(format!("{CLIENT_CERTIFICATE} (it hung up)"))
        }
        other => other,
    }
}
