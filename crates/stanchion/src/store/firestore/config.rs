//! Parses the store's URL and its options.

use super::error::error;
use crate::error::{Error, ErrorKind, Result};
use crate::store::url::percent_decoded;

const OPTIONS: &str = "the options are `collection` and `emulator`";

/// Settings of a store URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Config {
    /// `projects/PROJECT/databases/DATABASE`.
    pub(super) database: String,
    /// Prefix of the collection names.
    pub(super) collection: String,
    /// `host:port` of an emulator, which is used in plain text and without credentials.
    pub(super) emulator: Option<String>,
}

impl Config {
    /// Parses a URL. An emulator in the URL overrides the one in `FIRESTORE_EMULATOR_HOST`.
    pub(super) fn from_url(url: &str) -> Result<Self> {
        let environment = std::env::var("FIRESTORE_EMULATOR_HOST").ok();
        Self::read(url, environment.filter(|host| !host.is_empty()))
    }

    fn read(url: &str, environment: Option<String>) -> Result<Self> {
        let rest = url.strip_prefix("firestore://").ok_or_else(|| invalid("a URL must begin with `firestore://`"))?;
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (project, database) = path.split_once('/').unwrap_or((path, ""));
        let project = text("the project", project)?;
        let database = text("the database", database)?;
        // A project ID can start with a domain: `example.com:project`.
        let fits_project = |c: char| c.is_ascii_alphanumeric() || "-.:".contains(c);
        if project.is_empty() || !project.chars().all(fits_project) {
            return Err(invalid("the project is missing or invalid: a URL is `firestore://PROJECT/DATABASE`"));
        }
        let database = if database.is_empty() { "(default)".to_owned() } else { database };
        if database != "(default)" && !database.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
            return Err(invalid("a database name consists of letters, digits and `-`, or is `(default)`"));
        }
        let (mut collection, mut emulator) = ("stanchion".to_owned(), environment);
        for option in query.split('&').filter(|option| !option.is_empty()) {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            match name {
                "collection" => collection = text("`collection`", value)?,
                "emulator" => emulator = Some(text("`emulator`", value)?),
                _ => return Err(invalid(format!("unknown option; {OPTIONS}"))),
            }
        }
        let fits = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        if collection.is_empty()
            || collection.len() > 100
            || !collection.chars().all(fits)
            || collection.starts_with('_')
        {
            let message = "`collection` must have 1 to 100 letters, digits, `-` or `_`, and must not begin with `_`";
            return Err(invalid(message));
        }
        // Reject `user@host`: an emulator has no credentials, and a secret in the URL would appear in errors.
        let fits_host = |host: &String| !host.contains('@') && format!("http://{host}").parse::<http::Uri>().is_ok();
        if emulator.as_ref().is_some_and(|host| !fits_host(host)) {
            return Err(invalid("`emulator` must be `host:port`"));
        }
        Ok(Self { database: format!("projects/{project}/databases/{database}"), collection, emulator })
    }
}

fn invalid(message: impl Into<String>) -> Error {
    error(ErrorKind::InvalidArgument, message)
}

fn text(name: &str, encoded: &str) -> Result<String> {
    let bytes = percent_decoded(encoded)
        .ok_or_else(|| invalid(format!("{name}: a `%` must be followed by two hexadecimal digits")))?;
    String::from_utf8(bytes).map_err(|_| invalid(format!("{name} is not UTF-8")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn url_sets_project_database_and_collection() {
        let read = |url| Config::read(url, None).unwrap();
        let plain = read("firestore://p");
        assert_eq!(
            (plain.database.as_str(), plain.collection.as_str()),
            ("projects/p/databases/(default)", "stanchion")
        );
        assert_eq!(plain.emulator, None);
        let full = read("firestore://example.com:p/locks-1?collection=jobs&emulator=127.0.0.1:8080");
        assert_eq!(full.database, "projects/example.com:p/databases/locks-1");
        assert_eq!((full.collection.as_str(), full.emulator.as_deref()), ("jobs", Some("127.0.0.1:8080")));
        assert_eq!(read("firestore://p/%28default%29").database, plain.database);
    }

    #[test]
    fn url_emulator_overrides_environment() {
        let environment = Some("localhost:1".to_owned());
        assert_eq!(Config::read("firestore://p", environment.clone()).unwrap().emulator, environment);
        let named = Config::read("firestore://p?emulator=localhost:2", environment).unwrap();
        assert_eq!(named.emulator.as_deref(), Some("localhost:2"));
    }

    #[test]
    fn malformed_urls_are_rejected() {
        for url in [
            "firestore:p",
            "firestore://",
            "firestore:///d",
            "firestore://p/a/b",
            "firestore://p%2Fq",
            "firestore://p?collection=",
            "firestore://p?collection=a/b",
            "firestore://p?collection=__x__",
            "firestore://p?collections=x",
            "firestore://p?emulator=a%20b",
            "firestore://p?emulator=u:s3ntinel%40h:1",
            "firestore://p%",
        ] {
            assert_eq!(Config::read(url, None).unwrap_err().kind(), ErrorKind::InvalidArgument, "{url}");
        }
    }
}
