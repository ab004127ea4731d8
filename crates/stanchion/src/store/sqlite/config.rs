//! Finds the store's folder from a URL or from the user's environment.

use std::env;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::error::{error, misconfigured};
use crate::error::{ErrorKind, Result};
use crate::store::url::percent_decoded;

/// Returns the default folder: `stanchion` in `XDG_STATE_HOME`, or in `.local/state` of the home folder.
pub(super) fn default_folder() -> Result<PathBuf> {
    choose_default(env::var_os("XDG_STATE_HOME"), env::var_os("HOME"))
}

/// Returns the folder of a URL: `sqlite:` (the default folder), `sqlite:FOLDER` or `sqlite:///ABSOLUTE/FOLDER`.
///
/// `%XX` encodes a byte, so that a path can contain a `?` or a `%`.
pub(super) fn folder_of_url(url: &str) -> Result<PathBuf> {
    // The errors do not show the URL: a URL that was meant for another store may contain a password.
    let invalid = |why: &str| error(ErrorKind::InvalidArgument, why.to_owned());
    let rest = url
        .strip_prefix("sqlite:")
        .ok_or_else(|| invalid("the URL of the embedded store must begin with `sqlite:`"))?;
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    if let Some(option) = query.split('&').find(|option| !option.is_empty()) {
        let name = option.split('=').next().unwrap_or(option);
        let is_name = !url.contains('@') && name.chars().all(|c| c.is_ascii_lowercase() || c == '_');
        let shown = if is_name { format!("option `{name}`") } else { "options".to_owned() };
        return Err(invalid(&format!("the embedded store has no {shown}; write %3F for a question mark in a path")));
    }
    let path = match path.strip_prefix("//") {
        None => path,
        Some(absolute) if absolute.starts_with('/') => absolute,
        Some(_) => {
            return Err(invalid("`sqlite://` must be followed by an absolute path: write `sqlite:/folder`"));
        }
    };
    if path.is_empty() {
        return default_folder();
    }
    let bytes = percent_decoded(path).ok_or_else(|| invalid("a `%` must be followed by two hexadecimal digits"))?;
    Ok(PathBuf::from(OsString::from_vec(bytes)))
}

fn choose_default(state_home: Option<OsString>, home: Option<OsString>) -> Result<PathBuf> {
    // The XDG specification says that programs must ignore relative paths. A user without a home has `/`.
    let absolute =
        |value: Option<OsString>| value.map(PathBuf::from).filter(|path| path.is_absolute() && path.parent().is_some());
    absolute(state_home)
        .or_else(|| absolute(home).map(|home| home.join(".local").join("state")))
        .map(|state| state.join("stanchion"))
        .ok_or_else(|| {
            misconfigured(
                "no folder for the locks, because HOME is missing or is `/`: set HOME or XDG_STATE_HOME, or name a \
                 folder (sqlite:/FOLDER)",
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_folders() {
        let table = [
            ("sqlite:locks", "locks"),
            ("sqlite:./locks", "./locks"),
            ("sqlite:/var/lib/locks", "/var/lib/locks"),
            ("sqlite:///var/lib/locks", "/var/lib/locks"),
            ("sqlite:///a%3Fb%20c", "/a?b c"),
            ("sqlite:/a?", "/a"),
        ];
        for (url, folder) in table {
            assert_eq!(folder_of_url(url).unwrap(), PathBuf::from(folder), "{url}");
        }
    }

    #[test]
    fn invalid_urls_are_rejected() {
        for url in ["redis://x", "sqlite:/a?mode=ro", "sqlite:/a?x", "sqlite://host/a", "sqlite:/a%2", "sqlite:/a%zz"] {
            assert_eq!(folder_of_url(url).unwrap_err().kind(), ErrorKind::InvalidArgument, "{url}");
        }
        assert!(folder_of_url("sqlite:/a?mode=ro").unwrap_err().to_string().contains("`mode`"));
    }

    #[test]
    fn default_folder_is_in_the_state_folder() {
        let some = |text: &str| Some(OsString::from(text));
        assert_eq!(choose_default(some("/s"), some("/h")).unwrap(), PathBuf::from("/s/stanchion"));
        assert_eq!(choose_default(None, some("/h")).unwrap(), PathBuf::from("/h/.local/state/stanchion"));
        assert_eq!(choose_default(some("relative"), some("/h")).unwrap(), PathBuf::from("/h/.local/state/stanchion"));
        assert_eq!(choose_default(None, some("/")).unwrap_err().kind(), ErrorKind::Misconfigured);
        assert_eq!(choose_default(some(""), None).unwrap_err().kind(), ErrorKind::Misconfigured);
    }
}
