//! Parses the URL of a store and its options.

use std::collections::HashSet;
use std::net::IpAddr;
use std::path::PathBuf;

use redis::{Client, ClientTlsConfig, ConnectionAddr, IntoConnectionInfo, RedisConnectionInfo, TlsCertificates};

use super::error::{error, from_client};
use crate::error::{Error, ErrorKind, Result};
use crate::store::url::percent_decoded;

const DEFAULT_PORT: u16 = 6379;
const DEFAULT_SENTINEL_PORT: u16 = 26379;
const MAX_PREFIX_LENGTH: usize = 64;

/// Probable cause if the parts of a URL make no sense.
const ESCAPES: &str = "write special characters in a user, a password or an option as %XX, for example `@` as %40";

/// How the servers of a store are organized.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// One server.
    Single(Address),
    /// One primary, which the sentinels name.
    Sentinel { sentinels: Vec<Address>, service: String },
    /// A cluster, which is found through these nodes.
    Cluster { seeds: Vec<Address> },
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Address {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

impl Address {
    /// Returns whether a network leads to this address: it is no socket in the file system and no loopback address.
    fn is_remote(&self) -> bool {
        match self {
            Self::Unix(_) => false,
            Self::Tcp { host, .. } => match host.parse::<IpAddr>() {
                Ok(address) => !address.to_canonical().is_loopback(),
                Err(_) => !host.eq_ignore_ascii_case("localhost"),
            },
        }
    }
}

/// The settings in a URL.
#[derive(Clone)]
pub(super) struct Config {
    pub(super) layout: Layout,
    tls: bool,
    certificates: TlsCertificates,
    user: Option<String>,
    password: Option<String>,
    sentinel_user: Option<String>,
    sentinel_password: Option<String>,
    database: i64,
    pub(super) prefix: String,
    /// Number of replicas that must have a write before it counts.
    pub(super) min_replicas: u32,
}

impl std::fmt::Debug for Config {
    /// Omits the passwords.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config")
            .field("layout", &self.layout)
            .field("tls", &self.tls)
            .field("database", &self.database)
            .field("prefix", &self.prefix)
            .field("min_replicas", &self.min_replicas)
            .finish_non_exhaustive()
    }
}

impl Config {
    /// Parses a URL. An error never shows the part that may contain a password.
    pub(super) fn from_url(url: &str) -> Result<Self> {
        let (scheme, rest) = url.split_once("://").ok_or_else(|| {
            invalid("a Redis URL needs `://` after its scheme, for example `redis://127.0.0.1:6379`".to_owned())
        })?;
        let (tls, kind) = match scheme {
            "redis" => (false, ""),
            "rediss" => (true, ""),
            _ => match scheme.split_once('+') {
                Some(("redis", kind)) => (false, kind),
                Some(("rediss", kind)) => (true, kind),
                _ => (false, "unknown"),
            },
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        // A path may contain an `@`, and the part before it may contain a password.
        let (authority, path) = match rest.find('/') {
            Some(at) => (&rest[..at], &rest[at + 1..]),
            None => (rest, ""),
        };
        // Something like a query or a path may be the rest of a password, which must neither be shown nor be used as a
        // host.
        if query.contains('@') || (path.contains('@') && kind != "unix") {
            return Err(invalid(format!("an `@` comes after the hosts; {ESCAPES}")));
        }
        let (credentials, hosts) = authority.rsplit_once('@').unwrap_or(("", authority));
        let (user, password) = credentials.split_once(':').unwrap_or((credentials, ""));
        let mut config = Self {
            layout: Layout::Cluster { seeds: Vec::new() },
            tls,
            certificates: TlsCertificates { client_tls: None, root_cert: None },
            user: text("the user", user)?,
            password: text("the password", password)?,
            sentinel_user: None,
            sentinel_password: None,
            database: 0,
            prefix: "stanchion".to_owned(),
            min_replicas: 0,
        };
        let mut database = "";
        config.layout = match kind {
            "" => {
                database = path;
                let [address] = <[Address; 1]>::try_from(addresses(hosts, DEFAULT_PORT)?).map_err(|_| {
                    invalid(
                        "`redis://` takes one host; for several use `redis+cluster://` or `redis+sentinel://`".into(),
                    )
                })?;
                Layout::Single(address)
            }
            "unix" if tls || !hosts.is_empty() || path.is_empty() => {
                return Err(invalid("write a socket as `redis+unix:///path/to/redis.sock`".into()));
            }
            "unix" => {
                let path = text("the path of the socket", path)?.unwrap_or_default();
                Layout::Single(Address::Unix(PathBuf::from(format!("/{path}"))))
            }
            "cluster" if !path.is_empty() => {
                return Err(invalid("a cluster has no databases: omit the path after the hosts".into()));
            }
            "cluster" => Layout::Cluster { seeds: addresses(hosts, DEFAULT_PORT)? },
            "sentinel" => {
                let (service, number) = path.split_once('/').unwrap_or((path, ""));
                database = number;
                let service = text("the service", service)?.ok_or_else(|| {
                    invalid(
                        "the service is missing after the sentinels: `redis+sentinel://host1,host2/mymaster`".into(),
                    )
                })?;
                Layout::Sentinel { sentinels: addresses(hosts, DEFAULT_SENTINEL_PORT)?, service }
            }
            _ => {
                let known = "redis, rediss, redis+unix, redis+sentinel, rediss+sentinel, redis+cluster, rediss+cluster";
                return Err(invalid(format!("unknown scheme; the schemes are {known}")));
            }
        };
        if !database.is_empty() {
            config.database = i64::from(number::<u32>("the database", database)?);
        }
        let (mut certificate, mut certificate_key) = (None, None);
        let mut given = HashSet::new();
        for option in query.split('&').filter(|option| !option.is_empty()) {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            // The name was accepted before, so it is no part of a password.
            if !given.insert(name) {
                return Err(invalid(format!("`{name}` is given twice")));
            }
            match name {
                "db" if matches!(kind, "unix") => config.database = i64::from(number::<u32>("`db`", value)?),
                "prefix" => config.prefix = prefix(value)?,
                "min_replicas" => config.min_replicas = number("`min_replicas`", value)?,
                "ca_file" if tls => config.certificates.root_cert = Some(file("`ca_file`", value)?),
                "cert_file" if tls => certificate = Some(file("`cert_file`", value)?),
                "key_file" if tls => certificate_key = Some(file("`key_file`", value)?),
                "sentinel_user" if kind == "sentinel" => config.sentinel_user = text("`sentinel_user`", value)?,
                "sentinel_password" if kind == "sentinel" => {
                    config.sentinel_password = text("`sentinel_password`", value)?;
                }
                _ if name.is_empty() || !name.chars().all(|c| c.is_ascii_lowercase() || c == '_') => {
                    return Err(invalid(format!("unknown option; {ESCAPES}")));
                }
                _ => {
                    let sentinel = if kind == "sentinel" { ", `sentinel_user`, `sentinel_password`" } else { "" };
                    let unix = if kind == "unix" { ", `db`" } else { "" };
                    let tls = if tls { ", `ca_file`, `cert_file`, `key_file`" } else { "" };
                    return Err(invalid(format!(
                        "unknown option `{name}`; the options are `prefix`, `min_replicas`{sentinel}{unix}{tls}"
                    )));
                }
            }
        }
        config.certificates.client_tls = match (certificate, certificate_key) {
            (Some(client_cert), Some(client_key)) => Some(ClientTlsConfig { client_cert, client_key }),
            (None, None) => None,
            _ => return Err(invalid("`cert_file` and `key_file` belong together".into())),
        };
        Ok(config)
    }

    /// Returns whether connections are encrypted.
    pub(super) fn uses_tls(&self) -> bool {
        self.tls
    }

    /// Returns the client for a server that stores locks.
    pub(super) fn server(&self, address: &Address) -> Result<Client> {
        let settings = RedisConnectionInfo::default().set_db(self.database);
        self.client(address, authenticated(settings, self.user.as_deref(), self.password.as_deref()))
    }

    /// Returns the client for a sentinel.
    pub(super) fn sentinel(&self, address: &Address) -> Result<Client> {
        let (user, password) = (self.sentinel_user.as_deref(), self.sentinel_password.as_deref());
        self.client(address, authenticated(RedisConnectionInfo::default(), user, password))
    }

    /// Returns the first of these servers, or of the sentinels, to which a password is sent unencrypted over a network.
    pub(super) fn sends_password_to<'a>(&'a self, servers: &'a [Address]) -> Option<&'a Address> {
        if self.tls {
            return None;
        }
        let sentinels = match &self.layout {
            Layout::Sentinel { sentinels, .. } if self.sentinel_password.is_some() => sentinels.as_slice(),
            _ => &[],
        };
        let servers = if self.password.is_some() { servers } else { &[] };
        sentinels.iter().chain(servers).find(|address| address.is_remote())
    }

    fn client(&self, address: &Address, settings: RedisConnectionInfo) -> Result<Client> {
        // `CLIENT SETINFO` would be one more command that a proxy or a user without rights may reject.
        let settings = settings.set_skip_set_lib_name();
        let address = match address {
            Address::Unix(path) => ConnectionAddr::Unix(path.clone()),
            Address::Tcp { host, port } if self.tls => {
                super::node::install_tls_provider();
                ConnectionAddr::TcpTls { host: host.clone(), port: *port, insecure: false, tls_params: None }
            }
            Address::Tcp { host, port } => ConnectionAddr::Tcp(host.clone(), *port),
        };
        let info = address.into_connection_info().map_err(|fault| from_client(&fault))?;
        let info = info.set_redis_settings(settings).set_tcp_settings(super::node::tcp_settings());
        let client =
            if self.tls { Client::build_with_tls(info, self.certificates.clone()) } else { Client::open(info) };
        client.map_err(|fault| from_client(&fault))
    }
}

fn invalid(message: String) -> Error {
    error(ErrorKind::InvalidArgument, message)
}

/// Adds the credentials. The client authenticates only if it has a password, so a user without one gets an empty
/// password.
fn authenticated(settings: RedisConnectionInfo, user: Option<&str>, password: Option<&str>) -> RedisConnectionInfo {
    match (user, password) {
        (Some(user), password) => settings.set_username(user).set_password(password.unwrap_or_default()),
        (None, Some(password)) => settings.set_password(password),
        (None, None) => settings,
    }
}

fn text(what: &str, encoded: &str) -> Result<Option<String>> {
    if encoded.is_empty() {
        return Ok(None);
    }
    let bytes = percent_decoded(encoded)
        .ok_or_else(|| invalid(format!("{what}: a `%` must be followed by two hexadecimal digits")))?;
    String::from_utf8(bytes).map(Some).map_err(|_| invalid(format!("{what} is not UTF-8")))
}

fn number<T: std::str::FromStr>(what: &str, text: &str) -> Result<T> {
    text.parse().map_err(|_| invalid(format!("{what} must be a whole number, 0 or more")))
}

fn file(what: &str, path: &str) -> Result<Vec<u8>> {
    let path = text(what, path)?.unwrap_or_default();
    std::fs::read(&path).map_err(|fault| invalid(format!("{what}: {path} cannot be read: {fault}")))
}

fn prefix(text: &str) -> Result<String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | ':' | '/');
    if text.is_empty() || text.len() > MAX_PREFIX_LENGTH || !text.chars().all(fits) {
        return Err(invalid(format!(
            "`prefix` must have 1 to {MAX_PREFIX_LENGTH} characters: letters, digits, `_`, `-`, `.`, `:`, `/`"
        )));
    }
    Ok(text.to_owned())
}

fn addresses(hosts: &str, default_port: u16) -> Result<Vec<Address>> {
    // Servers write the address of another server without brackets and with a port. In a URL, its end would be a guess.
    if hosts.split(',').any(|host| !host.starts_with('[') && host.matches(':').count() > 1) {
        return Err(invalid("write an IPv6 address in [brackets], for example `[::1]:6379`".into()));
    }
    let list: Result<Vec<_>> = hosts.split(',').map(|host| address(host, default_port)).collect();
    list.map_err(|_| {
        let message = "a host is missing or malformed, or a port is not a number from 1 to 65535: write `host:port`, or \
                       `[address]:port` for IPv6";
        invalid(message.into())
    })
}

/// Parses `host`, `host:port`, `[ipv6]` or `[ipv6]:port`.
pub(super) fn address(text: &str, default_port: u16) -> Result<Address> {
    let malformed = || invalid("a malformed address".into());
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or_else(malformed)?;
            (host, rest.strip_prefix(':').or(rest.is_empty().then_some("")).ok_or_else(malformed)?)
        }
        None => text.rsplit_once(':').unwrap_or((text, "")),
    };
    let port = match port {
        "" => default_port,
        port => port.parse().ok().filter(|port| *port != 0).ok_or_else(malformed)?,
    };
    if host.is_empty() || host.chars().any(|c| c.is_control() || c.is_whitespace() || c == '/') {
        return Err(malformed());
    }
    Ok(Address::Tcp { host: host.to_owned(), port })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp { host: host.to_owned(), port }
    }

    #[test]
    fn every_kind_of_url_is_parsed() {
        let read = |url: &str| Config::from_url(url).unwrap();
        assert_eq!(read("redis://h").layout, Layout::Single(tcp("h", 6379)));
        let full = read("rediss://us%40er:p%3A@h:7/3?prefix=a:b&min_replicas=2");
        assert_eq!((full.layout, full.tls), (Layout::Single(tcp("h", 7)), true));
        assert_eq!((full.user.as_deref(), full.password.as_deref()), (Some("us@er"), Some("p:")));
        assert_eq!((full.database, full.prefix.as_str(), full.min_replicas), (3, "a:b", 2));
        assert_eq!(read("redis://:secret@[::1]:1").layout, Layout::Single(tcp("::1", 1)));
        assert_eq!(read("redis://:secret@h").password.as_deref(), Some("secret"));
        let unix = read("redis+unix:///run/redis.sock?db=2");
        assert_eq!((unix.layout, unix.database), (Layout::Single(Address::Unix("/run/redis.sock".into())), 2));
        assert_eq!(
            read("redis+sentinel://a,b:1/main/4").layout,
            Layout::Sentinel { sentinels: vec![tcp("a", 26379), tcp("b", 1)], service: "main".into() }
        );
        assert_eq!(read("rediss+cluster://a,b:1").layout, Layout::Cluster { seeds: vec![tcp("a", 6379), tcp("b", 1)] });
    }

    #[test]
    fn unencrypted_passwords_are_noticed() {
        let insecure_address = |url: &str| {
            let config = Config::from_url(url).unwrap();
            let servers = match &config.layout {
                Layout::Single(address) => vec![address.clone()],
                Layout::Sentinel { .. } => vec![tcp("10.0.0.9", 1)],
                Layout::Cluster { seeds } => seeds.clone(),
            };
            config.sends_password_to(&servers).map(ToString::to_string)
        };
        assert_eq!(insecure_address("redis://:secret@10.0.0.1:7").as_deref(), Some("10.0.0.1:7"));
        assert_eq!(insecure_address("redis://user:secret@db.example").as_deref(), Some("db.example:6379"));
        assert_eq!(insecure_address("redis+cluster://:secret@127.0.0.1,10.0.0.2").as_deref(), Some("10.0.0.2:6379"));
        assert_eq!(insecure_address("redis+sentinel://:secret@127.0.0.1/main").as_deref(), Some("10.0.0.9:1"));
        assert_eq!(insecure_address("redis+sentinel://h/main?sentinel_password=secret").as_deref(), Some("h:26379"));
        for url in [
            "redis://10.0.0.1",
            "rediss://:secret@10.0.0.1",
            "redis://:secret@127.0.0.1",
            "redis://:secret@127.9.9.9",
            "redis://:secret@localhost",
            "redis://:secret@[::1]",
            "redis://:secret@[::ffff:127.0.0.1]",
            "redis+sentinel://10.0.0.1/main",
        ] {
            assert_eq!(insecure_address(url), None, "{url}");
        }
    }

    #[test]
    fn url_errors_hide_the_password() {
        for (url, says) in [
            ("redis:h", "`://`"),
            ("redis://", "a host is missing"),
            ("redis://u:secret@h:65536", "a number from 1 to 65535"),
            ("redis://u:secret@h:0", "a number from 1 to 65535"),
            ("redis://u:secret@a,b", "one host"),
            ("redis://u:secret@h/x", "the database must be a whole number"),
            ("redis://u:secret@h?ttl=1", "unknown option `ttl`"),
            ("redis://u:secret@h?prefix={", "`prefix` must have 1 to 64"),
            ("redis://u:secret%@h", "two hexadecimal digits"),
            ("redis+sentinel://u:secret@h", "the service is missing"),
            ("redis+cluster://u:secret@h/1", "no databases"),
            ("redis+unix://u:secret@h/x", "redis+unix:///path"),
            ("redis+other://u:secret@h", "unknown scheme"),
            ("redis://u:1?secret@h", "as %XX"),
            ("redis://u:p@127.0.0.1?secret@h:7840", "as %XX"),
            ("redis://u:p@h?SECRETsecret=1", "as %XX"),
            ("redis+sentinel://u:1/secret@h", "as %XX"),
            ("redis+sentinel://h/s?sentinel_password=p@secret", "as %XX"),
            ("redis://u:secret@::1", "write an IPv6 address in [brackets]"),
            ("redis+cluster://h,::1:7000", "write an IPv6 address in [brackets]"),
            ("redis://u:secret@h?prefix=a&prefix=b", "`prefix` is given twice"),
            ("redis+sentinel://h/s?sentinel_user=a&min_replicas=1&sentinel_user=a", "`sentinel_user` is given twice"),
        ] {
            let error = Config::from_url(url).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            let text = format!("{error} {error:?}");
            assert!(text.contains(says) && !text.to_lowercase().contains("secret"), "{url}: {text}");
        }
        let config = Config::from_url("redis://user:secret@h").unwrap();
        assert!(!format!("{config:?}").contains("secret"));
    }
}
