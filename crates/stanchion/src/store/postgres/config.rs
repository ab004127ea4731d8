//! Reads the URL of the store and its options.

use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use tokio_postgres::config::{Host, SslMode, TargetSessionAttrs};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::error::error;
use crate::error::{Error, ErrorKind, Result};
use crate::store::url::percent_decoded;

/// Time after which an attempt to connect is given up.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Default maximum number of connections for operations on keys.
const DEFAULT_POOL_SIZE: usize = 16;

/// Maximum length of the schema's name, in characters: the server cuts longer names off.
const MAX_SCHEMA_LENGTH: usize = 63;

/// The settings that a URL contains.
#[derive(Clone)]
pub(super) struct Config {
    /// The endpoint for operations.
    pub(super) operations: Endpoint,
    /// The endpoint for pushes: the same one, or the server behind a pooler. Without an endpoint waiting calls poll.
    pub(super) listen: Option<Endpoint>,
    /// The name of the schema, quoted.
    pub(super) schema: String,
    /// Maximum number of connections for operations on keys.
    pub(super) pool: usize,
    /// Whether the store creates a missing schema.
    pub(super) create_schema: bool,
}

/// A server, and how to connect to it.
#[derive(Clone)]
pub(super) struct Endpoint {
    pub(super) settings: tokio_postgres::Config,
    pub(super) tls: Tls,
}

/// How connections are encrypted.
#[derive(Clone)]
pub(super) enum Tls {
    None,
    Verified(MakeRustlsConnect),
}

impl std::fmt::Debug for Config {
    /// Omits the passwords.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config")
            .field("hosts", &self.operations.settings.get_hosts())
            .field("schema", &self.schema)
            .field("pool", &self.pool)
            .finish_non_exhaustive()
    }
}

impl Config {
    /// Reads a URL. An error text omits the part of the URL that may contain a password.
    pub(super) fn from_url(url: &str) -> Result<Self> {
        let (base, query) = url.split_once('?').unwrap_or((url, ""));
        let mut rest = Vec::new();
        let (mut schema, mut pool, mut listen) = ("stanchion".to_owned(), DEFAULT_POOL_SIZE, None);
        let mut create_schema = false;
        let (mut mode, mut authorities, mut certificate, mut key) = (None, None, None, None);
        for option in query.split('&').filter(|option| !option.is_empty()) {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            match name {
                "create_schema" => {
                    create_schema =
                        value.parse().map_err(|_| invalid("`create_schema` must be `true` or `false`".into()))?
                }
                "schema" => schema = text("`schema`", value)?,
                "pool" => pool = number("`pool`", value)?,
                "listen" => listen = Some(text("`listen`", value)?),
                "sslmode" => mode = Some(ssl_mode(value)?),
                "ca_file" => authorities = Some(text("`ca_file`", value)?),
                "cert_file" => certificate = Some(text("`cert_file`", value)?),
                "key_file" => key = Some(text("`key_file`", value)?),
                _ => rest.push(option),
            }
        }
        if pool == 0 {
            return Err(invalid("`pool`, the maximum number of connections, must be 1 or more".into()));
        }
        let query = if rest.is_empty() { String::new() } else { format!("?{}", rest.join("&")) };
        let operations = connection(&format!("{base}{query}"), url)?;
        let in_listen = |fault: Error| {
            invalid(format!(
                "`listen` must be `none`, or a URL with its special characters as %XX: {}",
                fault.message()
            ))
        };
        let listen = match listen.as_deref() {
            Some("none") => None,
            Some(url) => Some(connection(url, url).map_err(in_listen)?),
            None => Some(operations.clone()),
        };
        // A pooler may run on this machine and the server elsewhere, so each endpoint is judged on its own.
        let encrypts = |settings: &tokio_postgres::Config| mode.unwrap_or_else(|| !is_local(settings));
        let files = [authorities.as_deref(), certificate.as_deref(), key.as_deref()];
        let tls = if encrypts(&operations) || listen.as_ref().is_some_and(encrypts) {
            Tls::Verified(MakeRustlsConnect::new(client_config(files)?))
        } else if files.iter().any(Option::is_some) {
            return Err(invalid("certificates have no effect without `sslmode=verify-full`".into()));
        } else {
            Tls::None
        };
        let endpoint = |mut settings: tokio_postgres::Config| {
            let encrypts = encrypts(&settings);
            settings.ssl_mode(if encrypts { SslMode::Require } else { SslMode::Disable });
            Endpoint { settings, tls: if encrypts { tls.clone() } else { Tls::None } }
        };
        Ok(Self {
            operations: endpoint(operations),
            listen: listen.map(endpoint),
            schema: quoted(&schema)?,
            pool,
            create_schema,
        })
    }
}

const ESCAPING: &str = "write special characters in a user or a password as %XX";

/// Parses the options of the client. `whole` is the URL as the user gave it.
fn connection(url: &str, whole: &str) -> Result<tokio_postgres::Config> {
    let mut config: tokio_postgres::Config = url.parse().map_err(|fault: tokio_postgres::Error| {
        // The client's message names the option and no value. But a part of a password can look like an option.
        let cause = std::error::Error::source(&fault).map(ToString::to_string).unwrap_or_default();
        let name = cause.split('`').nth(1).unwrap_or_default();
        let is_name = name.chars().all(|c| c.is_ascii_lowercase() || c == '_');
        let is_password = whole.split_once('?').is_some_and(|(_, query)| query.contains('@'));
        let cause = match name {
            "port" => "`port` must be a number from 1 to 65535".to_owned(),
            _ if is_name && !is_password => cause,
            _ => ESCAPING.to_owned(),
        };
        let options = "`schema`, `pool`, `listen`, `sslmode`, `ca_file`, `cert_file`, `key_file`, `create_schema` and those of the client";
        invalid(format!("the URL must have the form `postgres://host:5432/database`: {cause}; the options are {options}"))
    })?;
    if config.get_hosts().is_empty() {
        return Err(invalid("a host is missing: the URL must have the form `postgres://host:5432/database`".into()));
    }
    // A password ends at its first `/`, `?` or `@`, and the rest of it counts as a host or a database.
    let has_rest = url.split('?').next().is_some_and(|base| base.matches('@').count() > 1)
        || url.split_once("://").and_then(|(_, rest)| rest.split_once('/')).is_some_and(|(_, path)| path.contains('@'));
    if has_rest || config.get_hosts().iter().any(|host| matches!(host, Host::Tcp(name) if name.contains('@'))) {
        return Err(invalid(format!("a host or a database must not contain `@`: {ESCAPING}")));
    }
    let hosts = u32::try_from(config.get_hosts().len()).unwrap_or(u32::MAX);
    if hosts > 1 {
        // Several hosts are a primary and its standbys. Locks need the primary.
        config.target_session_attrs(TargetSessionAttrs::ReadWrite);
    }
    config.connect_timeout(CONNECT_TIMEOUT / hosts).keepalives_idle(Duration::from_secs(3));
    config.keepalives_interval(Duration::from_secs(1)).keepalives_retries(3).tcp_user_timeout(Duration::from_secs(6));
    if config.get_application_name().is_none() {
        config.application_name("stanchion");
    }
    Ok(config)
}

/// Returns whether no data leaves this machine. If there is a `hostaddr`, the client connects to that address and
/// ignores the name of the host.
fn is_local(config: &tokio_postgres::Config) -> bool {
    let is_local = |host: &Host| match host {
        Host::Unix(_) => true,
        Host::Tcp(name) => {
            name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
        }
    };
    config.get_hosts().iter().all(is_local) && config.get_hostaddrs().iter().all(std::net::IpAddr::is_loopback)
}

/// Returns whether connections are encrypted. Encrypted connections are always verified.
fn ssl_mode(text: &str) -> Result<bool> {
    match text {
        "disable" => Ok(false),
        "require" | "verify-ca" | "verify-full" => Ok(true),
        _ => Err(invalid(
            "`sslmode` must be `disable` or `verify-full` (`require` and `verify-ca` mean the same as `verify-full`)"
                .into(),
        )),
    }
}

fn client_config([authorities, certificate, key]: [Option<&str>; 3]) -> Result<ClientConfig> {
    let unreadable = |option: &str, path: &str, fault: &dyn std::fmt::Display| {
        invalid(format!("`{option}`: {path} cannot be read as PEM: {fault}"))
    };
    let read = |option: &str, path: &str| -> Result<Vec<CertificateDer<'static>>> {
        let all = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
        all.map_err(|fault| unreadable(option, path, &fault))
    };
    let mut roots = RootCertStore::empty();
    match authorities {
        Some(path) => {
            let (added, _) = roots.add_parsable_certificates(read("ca_file", path)?);
            if added == 0 {
                return Err(invalid(format!("`ca_file`: {path} contains no certificate")));
            }
        }
        None => {
            let system = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(system.certs);
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.map_err(|fault| error(ErrorKind::Internal, format!("TLS: {fault}")))?;
    let builder = builder.with_root_certificates(roots);
    match (certificate, key) {
        (None, None) => Ok(builder.with_no_client_auth()),
        (Some(certificate), Some(key)) => {
            let key = PrivateKeyDer::from_pem_file(key).map_err(|fault| unreadable("key_file", key, &fault))?;
            let config = builder.with_client_auth_cert(read("cert_file", certificate)?, key);
            config.map_err(|fault| invalid(format!("`cert_file` and `key_file`: {fault}")))
        }
        _ => Err(invalid("`cert_file` and `key_file` must be given together".into())),
    }
}

fn invalid(message: String) -> Error {
    error(ErrorKind::InvalidArgument, message)
}

fn text(option: &str, encoded: &str) -> Result<String> {
    let bytes = percent_decoded(encoded)
        .ok_or_else(|| invalid(format!("{option}: a `%` must be followed by two hexadecimal digits")))?;
    String::from_utf8(bytes).map_err(|_| invalid(format!("{option} is not UTF-8")))
}

fn number<T: std::str::FromStr>(option: &str, text: &str) -> Result<T> {
    text.parse().map_err(|_| invalid(format!("{option} must be a whole number")))
}

/// Returns the name of the schema in quotes, for SQL.
fn quoted(schema: &str) -> Result<String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if schema.is_empty() || schema.len() > MAX_SCHEMA_LENGTH || !schema.chars().all(fits) || schema.starts_with("pg_") {
        return Err(invalid(format!(
            "`schema` must have 1 to {MAX_SCHEMA_LENGTH} letters, digits or `_`, and must not begin with `pg_`"
        )));
    }
    Ok(format!("\"{schema}\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_urls_are_rejected_with_a_hint() {
        for (url, hint) in [
            ("postgres://", "a host is missing"),
            ("postgres:///app", "a host is missing"),
            ("postgres://h:port/app", "`port` must be a number from 1 to 65535"),
            ("postgres://h:65536/app", "`port` must be a number from 1 to 65535"),
            ("postgres://h/app?colour=red", "unknown option `colour`; the options are `schema`"),
            ("postgres://h/app?schema=", "`schema` must have 1 to 63 letters"),
            ("postgres://h/app?schema=pg_x", "must not begin with `pg_`"),
            ("postgres://h/app?schema=a%22b", "letters, digits or `_`"),
            ("postgres://h/app?schema=%zz", "two hexadecimal digits"),
            ("postgres://h/app?pool=0", "1 or more"),
            ("postgres://h/app?pool=many", "`pool` must be a whole number"),
            ("postgres://h/app?listen=", "`listen` must be `none`, or a URL"),
            ("postgres://h/app?listen=redis://x", "`listen` must be `none`, or a URL"),
            ("postgres://h/app?sslmode=prefer", "`disable` or `verify-full`"),
            ("postgres://h/app?ca_file=/no/such", "`ca_file`: /no/such cannot be read as PEM"),
            ("postgres://localhost/app?ca_file=/no/such", "have no effect without `sslmode=verify-full`"),
            ("postgres://h/app?cert_file=/x", "must be given together"),
            ("postgres://h/app?create_schema=yes", "`true` or `false`"),
        ] {
            let fault = Config::from_url(url).unwrap_err();
            assert_eq!(fault.kind(), ErrorKind::InvalidArgument, "{url}");
            assert!(fault.message().contains(hint), "{url}: {fault}");
        }
    }

    #[test]
    fn passwords_stay_out_of_errors_and_debug_output() {
        let url = "postgres://me:hunter2@h/app?listen=postgres%3A%2F%2Fme%3Ahunter2%40d%2Fapp";
        assert!(!format!("{:?}", Config::from_url(url).unwrap()).contains("hunter2"));
        for wrong in [
            "postgres://me:hunter2@h:x/app",
            "postgres://me:hunter2@h/app?listen=postgres://me:hunter2@d:x/app",
            "postgres://me:a@b?hunter2@h/app",
            "postgres://me:a@b?hunter=1&schema=x@h/app",
            "postgres://me:a@b?hunter=2@h/app",
            "postgres://me:a@hunter2@h/app",
            "postgres://me:a@b@hunter/app",
            "postgres://h/app?host=a%40hunter2",
            "postgres://h/app?hunter2=1",
            "postgres://me:a@b/hunter2@h/app",
            "postgres://hunter2:pass@h:x/app",
            "postgres://hunter2/pass@h/app",
            "postgres://hunter2@h/app?pool=0",
            "postgres://h/app?listen=postgres%3A%2F%2Fme%3Aa%40b%3Fhunter2%40h%2Fapp",
            "postgres://h/app?listen=postgres%3A%2F%2Fme%3Aa%40hunter2%40h%2Fapp",
        ] {
            let fault = Config::from_url(wrong).unwrap_err();
            assert!(!format!("{fault} {fault:?}").contains("hunter"), "{wrong}: {fault:?}");
            assert!(fault.message().contains("%XX") || !wrong.contains("a@"), "{wrong}: {fault:?}");
        }
    }

    #[test]
    fn only_local_connections_are_unencrypted() {
        let is_encrypted = |url| matches!(Config::from_url(url).unwrap().operations.tls, Tls::Verified(_));
        assert!(is_encrypted("postgres://db.example/app") && is_encrypted("postgres://localhost/app?sslmode=require"));
        assert!(!is_encrypted("postgres://localhost/app") && !is_encrypted("postgres://127.0.0.1/app"));
        assert!(
            !is_encrypted("postgres://db.example/app?sslmode=disable") && !is_encrypted("postgres:///app?host=/run")
        );
        assert!(is_encrypted("postgres://localhost,db.example/app"), "one of the hosts is another machine");
        for (address, encrypts) in [
            ("localhost/app?hostaddr=192.0.2.7", true),
            ("127.0.0.1/app?hostaddr=192.0.2.7", true),
            ("[::1]/app?hostaddr=2001:db8::7", true),
            ("localhost,localhost/app?hostaddr=127.0.0.1,192.0.2.7", true),
            ("db.example/app?hostaddr=127.0.0.1", true),
            ("localhost/app?hostaddr=127.0.0.1", false),
            ("localhost/app?hostaddr=::1", false),
            ("/app?host=/run&hostaddr=192.0.2.7", true),
        ] {
            let url = format!("postgres://{address}");
            let operations = Config::from_url(&url).unwrap().operations;
            assert_eq!(matches!(operations.tls, Tls::Verified(_)), encrypts, "{address}");
            let listen =
                format!("postgres%3A%2F%2F{}", address.replace('/', "%2F").replace('?', "%3F").replace('&', "%26"));
            let config = Config::from_url(&format!("postgres://localhost/app?listen={listen}")).unwrap();
            assert_eq!(matches!(config.listen.unwrap().tls, Tls::Verified(_)), encrypts, "listen: {address}");
        }
        let both = Config::from_url("postgres://localhost/app?listen=postgres%3A%2F%2Fdb.example%2Fapp").unwrap();
        assert!(matches!((both.operations.tls, both.listen.unwrap().tls), (Tls::None, Tls::Verified(_))));
    }
}
