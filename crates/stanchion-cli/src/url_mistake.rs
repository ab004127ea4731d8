//! Finds common mistakes in the URL of a store, before the library sees it.

use crate::message::quoted;

/// Schemes of other programs, and ours for the same.
const OTHER_SCHEMES: [(&str, &str); 7] = [
    ("file", "sqlite:/FOLDER"),
    ("sqlite3", "sqlite:/FOLDER"),
    ("valkey", "redis://"),
    ("valkeys", "rediss://"),
    ("redis-sentinel", "redis+sentinel://"),
    ("pgsql", "postgres://"),
    ("psql", "postgres://"),
];

/// Returns what is wrong with a text that is not the URL of a store, and what would be right. It shows no part of the text
/// that may be a password.
pub(crate) fn find(url: &str) -> Option<String> {
    const FORMS: &str = "write sqlite:/FOLDER, redis://HOST or postgres://HOST/DATABASE";
    if url.trim() != url {
        return Some("has blanks around the URL: remove them".to_owned());
    }
    let is_quote = |c: char| matches!(c, '"' | '\'' | '`' | '“' | '”' | '‘' | '’');
    if url.starts_with(is_quote) || url.ends_with(is_quote) {
        return Some("has quotes around the URL, and no shell removes them here: remove them".to_owned());
    }
    if url.starts_with('/') || url.starts_with("~/") {
        return Some(format!("holds a path and no URL: write sqlite:{}", quoted(url)));
    }
    let (scheme, rest) = match url.split_once(':') {
        Some((scheme, rest)) if !scheme.is_empty() => (scheme, rest),
        _ => return Some(format!("holds no URL: {FORMS}")),
    };
    if scheme.contains('=') {
        return Some("holds an assignment: write the URL alone".to_owned());
    }
    let port = rest.split(['/', '?']).next().unwrap_or_default();
    if scheme != "sqlite" && port.parse::<u16>().is_ok() {
        let shown = quoted(&format!("{scheme}:{port}"));
        let url = match port {
            "5432" => format!("postgres://{shown}/DATABASE"),
            _ => format!("redis://{shown}, or postgres://{shown}/DATABASE"),
        };
        return Some(format!("holds a host and a port, and no scheme: write {url}"));
    }
    let lower = scheme.to_ascii_lowercase();
    if scheme == "memory" {
        return Some(format!("says `memory:`, which no other process can see: {FORMS}"));
    }
    if let Some((_, ours)) = OTHER_SCHEMES.iter().find(|(other, _)| *other == lower) {
        return Some(format!("has the scheme of another program: write {ours}"));
    }
    let is_ours = ["sqlite", "redis", "rediss", "postgres", "postgresql", "firestore"].contains(&lower.as_str());
    (is_ours && lower != scheme).then(|| format!("has a scheme in capitals: write `{lower}:`"))
}
