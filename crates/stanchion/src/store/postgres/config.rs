//! Where the store is: its URL and its options.

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

/// How long making a connection may take.
pub(super) const CONNECT_WITHIN: Duration = Duration::from_secs(3);

const DEFAULT_POOL: usize = 16;
const LONGEST_NAME: usize = 63;

/// All that a URL says.
#[derive(Clone)]
pub(super) struct Config {
    /// Where steps are done.
    pub(super) steps: Place,
    /// Where pushes are heard: the same place, or one that no pooler stands before.
    /// Nowhere, if waiting calls are to ask instead.
    pub(super) listen: Option<Place>,
    /// The name of the schema, quoted.
    pub(super) schema: String,
    /// The most connections for steps.
    pub(super) pool: usize,
    /// Whether the schema is made where it is not there.
    pub(super) create_schema: bool,
}

/// A server, and how to talk to it.
#[derive(Clone)]
pub(super) struct Place {
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
    /// Without the passwords.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config")
            .field("hosts", &self.steps.settings.get_hosts())
            .field("schema", &self.schema)
            .field("pool", &self.pool)
            .finish_non_exhaustive()
    }
}

impl Config {
    /// Reads a URL. What is wrong with it is told without the part that may hold a password.
    pub(super) fn from_url(url: &str) -> Result<Self> {
        let (base, query) = url.split_once('?').unwrap_or((url, ""));
        let mut rest = Vec::new();
        let (mut schema, mut pool, mut listen) = ("stanchion".to_owned(), DEFAULT_POOL, None);
        let mut create_schema = false;
        let (mut mode, mut authorities, mut certificate, mut key) = (None, None, None, None);
        for option in query.split('&').filter(|option| !option.is_empty()) {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            match name {
                "create_schema" => {
                    create_schema = value.parse().map_err(|_| invalid("`create_schema` is `true` or `false`".into()))?
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
            return Err(invalid("`pool` is the most connections for steps, 1 or more".into()));
        }
        let query = if rest.is_empty() { String::new() } else { format!("?{}", rest.join("&")) };
        let steps = connection(&format!("{base}{query}"), url)?;
        let of_listen = |fault: Error| {
            invalid(format!("`listen` (`none`, or a URL with its special characters as %XX): {}", fault.message()))
        };
        let listen = match listen.as_deref() {
            Some("none") => None,
            Some(url) => Some(connection(url, url).map_err(of_listen)?),
            None => Some(steps.clone()),
        };
        // A pooler may be on this machine, and the server elsewhere.
        let encrypts = |settings: &tokio_postgres::Config| mode.unwrap_or_else(|| !is_near(settings));
        let files = [authorities.as_deref(), certificate.as_deref(), key.as_deref()];
        let tls = if encrypts(&steps) || listen.as_ref().is_some_and(encrypts) {
            Tls::Verified(MakeRustlsConnect::new(client_config(files)?))
        } else if files.iter().any(Option::is_some) {
            return Err(invalid("certificates are of no use without `sslmode=verify-full`".into()));
        } else {
            Tls::None
        };
        let place = |mut settings: tokio_postgres::Config| {
            let encrypts = encrypts(&settings);
            settings.ssl_mode(if encrypts { SslMode::Require } else { SslMode::Disable });
            Place { settings, tls: if encrypts { tls.clone() } else { Tls::None } }
        };
        Ok(Self { steps: place(steps), listen: listen.map(place), schema: quoted(&schema)?, pool, create_schema })
    }
}

const SPECIAL: &str = "special characters of a user or a password are written as %XX";

/// What the client reads of a URL. `whole` is as the user gave it.
fn connection(url: &str, whole: &str) -> Result<tokio_postgres::Config> {
    let mut config: tokio_postgres::Config = url.parse().map_err(|fault: tokio_postgres::Error| {
        // The client's message names the option, and no value. What it takes for an option may be the rest of a password.
        let cause = std::error::Error::source(&fault).map(ToString::to_string).unwrap_or_default();
        let name = cause.split('`').nth(1).unwrap_or_default();
        let is_name = name.chars().all(|c| c.is_ascii_lowercase() || c == '_');
        let is_password = whole.split_once('?').is_some_and(|(_, query)| query.contains('@'));
        let cause = if is_name && !is_password { cause } else { SPECIAL.to_owned() };
        let options = "`schema`, `pool`, `listen`, `sslmode`, `ca_file`, `cert_file`, `key_file`, `create_schema` and those of the client";
        invalid(format!("this is no `postgres://host:5432/database`: {cause}; the options are {options}"))
    })?;
    if config.get_hosts().is_empty() {
        return Err(invalid("a host is missing: `postgres://host:5432/database`".into()));
    }
    // A `/`, `?` or `@` of a password ends it, and its rest is taken for a host or a database.
    let has_rest = url.split('?').next().is_some_and(|base| base.matches('@').count() > 1)
        || url.split_once("://").and_then(|(_, rest)| rest.split_once('/')).is_some_and(|(_, path)| path.contains('@'));
    if has_rest || config.get_hosts().iter().any(|host| matches!(host, Host::Tcp(name) if name.contains('@'))) {
        return Err(invalid(format!("a host and a database have no `@`: {SPECIAL}")));
    }
    let hosts = u32::try_from(config.get_hosts().len()).unwrap_or(u32::MAX);
    if hosts > 1 {
        // Of several servers it is the primary that is meant.
        config.target_session_attrs(TargetSessionAttrs::ReadWrite);
    }
    config.connect_timeout(CONNECT_WITHIN / hosts).keepalives_idle(Duration::from_secs(3));
    config.keepalives_interval(Duration::from_secs(1)).keepalives_retries(3).tcp_user_timeout(Duration::from_secs(6));
    if config.get_application_name().is_none() {
        config.application_name("stanchion");
    }
    Ok(config)
}

/// Whether nothing leaves this machine. `hostaddr` is where the client connects to, whatever the name of the host is.
fn is_near(config: &tokio_postgres::Config) -> bool {
    let is_near = |host: &Host| match host {
        Host::Unix(_) => true,
        Host::Tcp(name) => {
            name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
        }
    };
    config.get_hosts().iter().all(is_near) && config.get_hostaddrs().iter().all(std::net::IpAddr::is_loopback)
}

/// Whether connections are encrypted. Those that are, are verified.
fn ssl_mode(text: &str) -> Result<bool> {
    match text {
        "disable" => Ok(false),
        "require" | "verify-ca" | "verify-full" => Ok(true),
        _ => Err(invalid(
            "`sslmode` is `disable` or `verify-full` (`require` and `verify-ca` mean the same as `verify-full` here)"
                .into(),
        )),
    }
}

fn client_config([authorities, certificate, key]: [Option<&str>; 3]) -> Result<ClientConfig> {
    let unreadable = |what: &str, path: &str, fault: &dyn std::fmt::Display| {
        invalid(format!("`{what}`: {path} cannot be read as PEM: {fault}"))
    };
    let read = |what: &str, path: &str| -> Result<Vec<CertificateDer<'static>>> {
        let all = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
        all.map_err(|fault| unreadable(what, path, &fault))
    };
    let mut roots = RootCertStore::empty();
    match authorities {
        Some(path) => {
            let (added, _) = roots.add_parsable_certificates(read("ca_file", path)?);
            if added == 0 {
                return Err(invalid(format!("`ca_file`: there is no certificate in {path}")));
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
        _ => Err(invalid("`cert_file` and `key_file` belong together".into())),
    }
}

fn invalid(message: String) -> Error {
    error(ErrorKind::InvalidArgument, message)
}

fn text(what: &str, encoded: &str) -> Result<String> {
    let bytes = percent_decoded(encoded)
        .ok_or_else(|| invalid(format!("{what}: a `%` must be followed by two hexadecimal digits")))?;
    String::from_utf8(bytes).map_err(|_| invalid(format!("{what} is not UTF-8")))
}

fn number<T: std::str::FromStr>(what: &str, text: &str) -> Result<T> {
    text.parse().map_err(|_| invalid(format!("{what} must be a whole number")))
}

/// The name of the schema, as SQL takes it.
fn quoted(schema: &str) -> Result<String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if schema.is_empty() || schema.len() > LONGEST_NAME || !schema.chars().all(fits) || schema.starts_with("pg_") {
        return Err(invalid(format!(
            "`schema` has 1 to {LONGEST_NAME} characters: letters, digits, `_`; it does not begin with `pg_`"
        )));
    }
    Ok(format!("\"{schema}\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_that_is_wrong_is_told_what_would_be_right() {
        for (url, told) in [
            ("postgres://", "a host is missing"),
            ("postgres:///app", "a host is missing"),
            ("postgres://h:port/app", "`port`"),
            ("postgres://h/app?colour=red", "unknown option `colour`; the options are `schema`"),
            ("postgres://h/app?schema=", "`schema` has 1 to 63 characters"),
            ("postgres://h/app?schema=pg_x", "does not begin with `pg_`"),
            ("postgres://h/app?schema=a%22b", "letters, digits, `_`"),
            ("postgres://h/app?schema=%zz", "two hexadecimal digits"),
            ("postgres://h/app?pool=0", "1 or more"),
            ("postgres://h/app?pool=many", "`pool` must be a whole number"),
            ("postgres://h/app?listen=", "`listen` (`none`, or a URL"),
            ("postgres://h/app?listen=redis://x", "`listen` (`none`, or a URL"),
            ("postgres://h/app?sslmode=prefer", "`disable` or `verify-full`"),
            ("postgres://h/app?ca_file=/no/such", "`ca_file`: /no/such cannot be read as PEM"),
            ("postgres://localhost/app?ca_file=/no/such", "of no use without `sslmode=verify-full`"),
            ("postgres://h/app?cert_file=/x", "belong together"),
            ("postgres://h/app?create_schema=yes", "`true` or `false`"),
        ] {
            let fault = Config::from_url(url).unwrap_err();
            assert_eq!(fault.kind(), ErrorKind::InvalidArgument, "{url}");
            assert!(fault.message().contains(told), "{url}: {fault}");
        }
    }

    #[test]
    fn no_message_and_no_debug_text_tells_a_password() {
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
    fn connections_are_encrypted_but_to_this_machine() {
        let is_encrypted = |url| matches!(Config::from_url(url).unwrap().steps.tls, Tls::Verified(_));
        assert!(is_encrypted("postgres://db.example/app") && is_encrypted("postgres://localhost/app?sslmode=require"));
        assert!(!is_encrypted("postgres://localhost/app") && !is_encrypted("postgres://127.0.0.1/app"));
        assert!(
            !is_encrypted("postgres://db.example/app?sslmode=disable") && !is_encrypted("postgres:///app?host=/run")
        );
        assert!(is_encrypted("postgres://localhost,db.example/app"), "one of them is elsewhere");
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
            let steps = Config::from_url(&url).unwrap().steps;
            assert_eq!(matches!(steps.tls, Tls::Verified(_)), encrypts, "{address}");
            let listen =
                format!("postgres%3A%2F%2F{}", address.replace('/', "%2F").replace('?', "%3F").replace('&', "%26"));
            let config = Config::from_url(&format!("postgres://localhost/app?listen={listen}")).unwrap();
            assert_eq!(matches!(config.listen.unwrap().tls, Tls::Verified(_)), encrypts, "listen: {address}");
        }
        let both = Config::from_url("postgres://localhost/app?listen=postgres%3A%2F%2Fdb.example%2Fapp").unwrap();
        assert!(matches!((both.steps.tls, both.listen.unwrap().tls), (Tls::None, Tls::Verified(_))));
    }
}
