//! Writes and reads tokens as the tool prints them: `TOKEN@MARK`.
//!
//! TOKEN is the library's text, with `%XX` for characters that a shell or a line would change. MARK stands for the store, so
//! that a token is not taken for one that is over if another store is asked.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use stanchion::Token;

use crate::arguments::TokenSource;
use crate::message::{Failure, quoted};
use crate::store::StoreChoice;
use crate::{environment, exit_code};

/// Returns the text of a token, as the tool prints it.
pub(crate) fn text(token: &str, store: &StoreChoice) -> String {
    let mut text = String::with_capacity(token.len() + 9);
    for byte in token.bytes() {
        match byte {
            b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' | b'-' | b'.' | b'_' | b':' | b'/' | b'+' | b',' => {
                text.push(byte.into());
            }
            _ => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text + "@" + &store.mark()
}

/// A token that `acquire` has printed.
pub(crate) struct GivenToken {
    pub(crate) token: Token,
    mark: String,
}

impl GivenToken {
    /// Returns the token of the arguments, else of the environment.
    pub(crate) fn find(source: &TokenSource) -> Result<Self, Failure> {
        if let Some(text) = &source.token {
            return Self::parse(text.reveal(), "the argument");
        }
        if let Some(path) = &source.token_file {
            let shown = quoted(&path.to_string_lossy());
            let mut text = String::new();
            let read = File::open(path).and_then(|mut file| file.read_to_string(&mut text));
            read.map_err(|error| failed("cannot read", path, &error))?;
            return Self::parse(text.lines().next().unwrap_or_default(), &format!("`{shown}`"));
        }
        match std::env::var(environment::TOKEN) {
            Ok(text) if !text.is_empty() => Self::parse(&text, environment::TOKEN),
            _ => Err(Failure::new(
                exit_code::USAGE,
                format!(
                    "no token is given: put it into {}, or into a file (--token-file PATH); `acquire` prints it",
                    environment::TOKEN
                ),
            )),
        }
    }

    fn parse(text: &str, origin: &str) -> Result<Self, Failure> {
        let parse = || {
            let (token, mark) = text.trim().rsplit_once('@')?;
            Some(Self { token: decoded(token)?.parse().ok()?, mark: mark.to_owned() })
        };
        parse().ok_or_else(|| {
            let message =
                format!("{origin} holds no token as `acquire` prints it; to end a hold by its key, use force-release");
            Failure::new(exit_code::USAGE, message)
        })
    }

    /// Returns an error if the token was made in another store. For a token that holds nothing in this one: a store may have
    /// several URLs.
    pub(crate) fn check_store(&self, store: &StoreChoice) -> Result<(), Failure> {
        if self.mark == store.mark() {
            return Ok(());
        }
        let message = format!(
            "the token is of another store than {}, and holds nothing here: give the store that `acquire` used \
             (--store, --store-file or {})",
            store.shown(),
            environment::STORE
        );
        Err(Failure::new(exit_code::USAGE, message))
    }
}

fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        if *byte == b'%' {
            let (digits, after) = rest.split_at_checked(2)?;
            bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
            rest = after;
        } else {
            bytes.push(*byte);
        }
    }
    String::from_utf8(bytes).ok()
}

/// A file for a token, for its owner alone. It is opened before the wait for the key, so that a wrong path is reported at once.
#[derive(Debug)]
pub(crate) struct TokenFile {
    file: File,
    path: PathBuf,
    /// Nothing was in its place, and nothing is written: if it is dropped now, it is removed.
    is_surplus: bool,
}

impl TokenFile {
    /// Opens the file, or makes it. An earlier text stays in it until a token is written.
    pub(crate) fn open(path: &Path) -> Result<Self, Failure> {
        let options = |is_new: bool| {
            let mut options = OpenOptions::new();
            let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
            options.write(true).create_new(is_new).mode(0o600).custom_flags(flags).open(path)
        };
        let (opened, is_new) = match options(true) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => (options(false), false),
            opened => (opened, true),
        };
        let file = opened.map_err(|error| failed("cannot write", path, &error))?;
        let file = Self { file, path: path.to_owned(), is_surplus: is_new };
        let is_file = file.file.metadata().is_ok_and(|state| state.is_file());
        if !is_file {
            let shown = quoted(&path.to_string_lossy());
            let message = format!("`{shown}` is not a plain file: --token-file takes the path of a file to write");
            return Err(Failure::new(exit_code::USAGE, message));
        }
        file.file
            .set_permissions(Permissions::from_mode(0o600))
            .map_err(|error| failed("cannot write", path, &error))?;
        Ok(file)
    }

    /// Writes the token in place of what was there.
    pub(crate) fn write(mut self, token: &str) -> Result<(), Failure> {
        let written = self.file.set_len(0).and_then(|()| self.file.write_all(format!("{token}\n").as_bytes()));
        self.is_surplus &= written.is_err();
        written.map_err(|error| failed("cannot write", &self.path, &error))
    }
}

impl Drop for TokenFile {
    fn drop(&mut self) {
        if self.is_surplus {
            let _ = std::fs::remove_file(&self.path); // an empty file does no harm
        }
    }
}

fn failed(what: &str, path: &Path, error: &io::Error) -> Failure {
    let code = match error.kind() {
        io::ErrorKind::PermissionDenied => exit_code::NOT_PERMITTED,
        _ => exit_code::USAGE,
    };
    Failure::new(code, format!("{what} `{}` (of --token-file): {error}", quoted(&path.to_string_lossy())))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;

    #[test]
    fn any_key_survives_the_text_of_a_token() {
        for key in ["k", "a b", "x@y%z", "new\nline", "größe 漢", "'\"$`\\", "a.b/c:d"] {
            let library = format!("{}.{}.:{key}", "0".repeat(32), "f".repeat(32));
            let store = StoreChoice::of_url("sqlite:/somewhere");
            let text = text(&library, &store);
            assert!(text.bytes().all(|byte| byte.is_ascii_graphic() && !b"'\"$`\\ ".contains(&byte)), "{text}");
            let token = GivenToken::parse(&format!(" {text}\n"), "x").ok().unwrap();
            assert_eq!(token.token.to_string(), library);
            assert!(token.check_store(&store).is_ok());
            assert!(token.check_store(&StoreChoice::of_url("sqlite:/elsewhere")).is_err());
        }
    }

    #[test]
    fn malformed_tokens_are_refused() {
        for text in ["", "k", "@", "a@b", "%@x", "%zz@x", "0.0.:k@x", "%FF@x"] {
            let failure = GivenToken::parse(text, "the argument").err().unwrap();
            assert!(failure.code == exit_code::USAGE && failure.message.contains("holds no token"), "{text}");
        }
    }
}
