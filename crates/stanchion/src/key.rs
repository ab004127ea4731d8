//! Defines [`Key`], the validated name of a lock, and its namespaces.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use unicode_normalization::{UnicodeNormalization, is_nfc};

use crate::error::{Error, ErrorKind};
use crate::printable::is_printable;

/// The name of a lock, with its namespace.
///
/// - A name has 1 to 512 bytes of UTF-8 in Unicode normal form C: a composed and a decomposed spelling are the same
///   key. Case, spaces and look-alikes stay different.
/// - NUL is not allowed. Every other character is, `/`, `:`, `{}` and `..` included.
/// - Different pairs of namespace and name never give the same key.
///
/// The library validates keys here, once. A store only encodes them. Most calls take a `&str`, and make the key in the
/// namespace of the handle ([`Builder::namespace`](crate::Builder::namespace)).
///
/// ```
/// use stanchion::Key;
///
/// let key = Key::new("", "invoice:42")?;
/// assert_eq!(key.name(), "invoice:42");
/// assert_eq!(Key::new("", "caf\u{e9}")?, Key::new("", "cafe\u{301}")?);
/// assert_ne!(Key::new("a", "b:c")?, Key::new("a:b", "c")?);
/// assert!(Key::new("", "").is_err());
/// # Ok::<(), stanchion::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// `<length of the namespace in bytes>:<namespace><name>`. Without a namespace it is `:<name>`.
    text: Arc<str>,
    name_at: u16,
}

/// Maximum length of a key's name, in bytes.
pub const MAX_KEY_BYTES: usize = 512;

/// Maximum length of a namespace, in bytes.
pub const MAX_NAMESPACE_BYTES: usize = 128;

/// First character of the namespaces that are reserved for the library.
const RESERVED: char = '\u{1}';

impl Key {
    /// Creates the key `name` in `namespace`. An empty namespace means none.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if the name is empty, longer than [`MAX_KEY_BYTES`] or contains a NUL, or if the
    /// namespace is longer than [`MAX_NAMESPACE_BYTES`], contains a NUL or begins with U+0001.
    pub fn new(namespace: &str, name: &str) -> Result<Self, Error> {
        let namespace = normal(namespace);
        check_namespace(&namespace)?;
        Self::join(&namespace, name)
    }

    /// Returns a key that the library derives from this one for a purpose of its own. No user's key equals it.
    pub(crate) fn companion(&self, purpose: &str) -> Result<Self, Error> {
        Self::join(&companion_namespace(self.namespace(), purpose), self.name())
    }

    fn join(namespace: &str, name: &str) -> Result<Self, Error> {
        let name = normal(name);
        if name.is_empty() {
            return Err(invalid("a key may not be empty; give it 1 to 512 bytes".into()));
        }
        if name.len() > MAX_KEY_BYTES {
            return Err(invalid(format!(
                "the key has {} bytes, the longest allowed is {MAX_KEY_BYTES}; hash the long part of it",
                name.len()
            )));
        }
        if name.contains('\0') {
            return Err(invalid("a key may not contain a NUL character".into()));
        }
        Ok(Self::joined(namespace, &name))
    }

    fn joined(namespace: &str, name: &str) -> Self {
        let mut text = namespace_prefix(namespace);
        let name_at = text.len() as u16;
        text.push_str(name);
        Self { text: text.into(), name_at }
    }

    /// Returns the key in another namespace whose name is all of this key.
    pub(crate) fn within(&self, namespace: &str) -> Self {
        Self::joined(namespace, self.as_encoded())
    }

    /// Reverses [`within`](Self::within).
    pub(crate) fn without(&self, namespace: &str) -> Result<Self, Error> {
        match self.as_encoded().strip_prefix(&namespace_prefix(namespace)) {
            Some(text) => Self::from_encoded(text),
            None => Err(malformed()),
        }
    }

    /// Reads a key back from the text of [`Key::as_encoded`]. For authors of stores.
    ///
    /// # Errors
    /// [`ErrorKind::Internal`] if [`Key::as_encoded`] did not make the text.
    pub fn from_encoded(text: &str) -> Result<Self, Error> {
        let (length, rest) = text.split_once(':').ok_or_else(malformed)?;
        // No namespace, not even a reserved one, has more than 255 bytes.
        let length: u8 = if length.is_empty() { 0 } else { length.parse().map_err(|_| malformed())? };
        let (namespace, name) = rest.split_at_checked(length.into()).ok_or_else(malformed)?;
        // The limits were checked when the key was made, and a key from `within` may be longer than a user's key.
        let key = Self::joined(namespace, name);
        if name.is_empty() || key.as_encoded() != text { Err(malformed()) } else { Ok(key) }
    }

    /// Returns the whole key as one text, with its namespace, as stores keep it. Different keys have different texts.
    pub fn as_encoded(&self) -> &str {
        &self.text
    }

    /// Returns the name without the namespace.
    pub fn name(&self) -> &str {
        &self.text[usize::from(self.name_at)..]
    }

    /// Returns the namespace, which is empty if there is none.
    pub fn namespace(&self) -> &str {
        let prefix = &self.text[..usize::from(self.name_at)];
        prefix.split_once(':').map_or("", |(_, namespace)| namespace)
    }
}

/// Rejects a namespace that users may not have.
pub(crate) fn check_namespace(namespace: &str) -> Result<(), Error> {
    if namespace.len() > MAX_NAMESPACE_BYTES {
        let length = namespace.len();
        return Err(invalid(format!("the namespace has {length} bytes, the longest allowed is {MAX_NAMESPACE_BYTES}")));
    }
    if namespace.contains('\0') || namespace.starts_with(RESERVED) {
        return Err(invalid("a namespace may not contain a NUL character or begin with U+0001".into()));
    }
    Ok(())
}

/// Returns the namespace of the companions of all keys of a namespace.
pub(crate) fn companion_namespace(namespace: &str, purpose: &str) -> String {
    format!("{RESERVED}{purpose}/{namespace}")
}

/// Returns the text with which the encoded keys of a namespace begin, and no other keys.
pub(crate) fn namespace_prefix(namespace: &str) -> String {
    if namespace.is_empty() { ":".into() } else { format!("{}:{namespace}", namespace.len()) }
}

/// Returns the text in Unicode normal form C.
pub(crate) fn normal(text: &str) -> Cow<'_, str> {
    if text.is_ascii() || is_nfc(text) { text.into() } else { text.nfc().collect() }
}

fn malformed() -> Error {
    Error::new(ErrorKind::Internal, "the store holds a malformed key")
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidArgument, message)
}

impl fmt::Display for Key {
    /// Shows the name. Escapes the backslash and all characters that could mislead a terminal, a log or a reader.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.name().chars() {
            if is_printable(c) && c != '\\' { write!(f, "{c}")? } else { write!(f, "{}", c.escape_default())? }
        }
        Ok(())
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({:?})", &*self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_limited_to_512_bytes() {
        assert!(Key::new("", &"x".repeat(512)).is_ok());
        assert_eq!(Key::new("", &"x".repeat(513)).unwrap_err().kind(), ErrorKind::InvalidArgument);
        // The limit counts bytes, not characters.
        assert!(Key::new("", &"é".repeat(256)).is_ok());
        assert!(Key::new("", &"é".repeat(257)).is_err());
    }

    #[test]
    fn pairs_give_different_keys() {
        let pairs =
            [("", "1:ab"), ("a", "b"), ("ab", "c"), ("a", "bc"), ("", "a:b"), ("1:a", "b"), ("", ":"), (":", "x")];
        for (i, a) in pairs.iter().enumerate() {
            for b in &pairs[i + 1..] {
                let (x, y) = (Key::new(a.0, a.1).unwrap(), Key::new(b.0, b.1).unwrap());
                assert_ne!(x.as_encoded(), y.as_encoded(), "{a:?} and {b:?}");
            }
        }
    }

    #[test]
    fn companions_never_equal_user_keys() {
        let longest = "n".repeat(MAX_NAMESPACE_BYTES);
        for (namespace, name) in [("", "a"), ("billing", "a"), (longest.as_str(), "a")] {
            let key = Key::new(namespace, name).unwrap();
            let companion = key.companion("runs").unwrap();
            assert_eq!(Key::from_encoded(companion.as_encoded()).unwrap(), companion);
            assert!(Key::new(companion.namespace(), name).is_err(), "a user can name the companion");
            assert!(!companion.as_encoded().starts_with(&namespace_prefix(namespace)), "it is listed with the key");
        }
        let companions = [("", "a"), ("", "b"), ("a", "b"), ("a/", "b")]
            .map(|(namespace, name)| Key::new(namespace, name).unwrap().companion("runs").unwrap());
        assert!((1..4).all(|at| !companions[..at].contains(&companions[at])));
        assert!(Key::new("\u{1}", "a").is_err() && Key::new("", "\u{1}").is_ok());
    }

    #[test]
    fn encoded_keys_round_trip() {
        for (namespace, name) in [("", "a"), ("billing", "invoice:42"), ("", "3:abc"), ("ü", "ö/ä"), ("", ":")] {
            let key = Key::new(namespace, name).unwrap();
            let read = Key::from_encoded(key.as_encoded()).unwrap();
            assert_eq!(read, key);
            assert_eq!((read.namespace(), read.name()), (namespace, name));
        }
        let far_too_long = format!("70000:{}", "ü".repeat(40_000));
        for text in ["", "abc", "9:a", "x:a", "0:", "0:a", "01:ab", "1:ü", far_too_long.as_str()] {
            assert_eq!(Key::from_encoded(text).unwrap_err().kind(), ErrorKind::Internal, "{text:?}");
        }
    }

    #[test]
    fn keys_within_a_namespace_round_trip() {
        let longest = (&*"n".repeat(MAX_NAMESPACE_BYTES), &*"x".repeat(MAX_KEY_BYTES));
        // The third name begins with an accent that combines with the character before it.
        for (namespace, name) in [("", "a"), longest, ("e", "\u{301}x"), ("", ":")] {
            let key = Key::new(namespace, name).unwrap();
            for within in ["tenant", longest.0, "", "é"] {
                let outer = key.within(within);
                assert_eq!(Key::from_encoded(outer.as_encoded()).unwrap(), outer);
                assert_eq!(outer.without(within).unwrap(), key);
                assert!(outer.without("tenan").is_err());
                assert!(key.companion("runs").unwrap().within(within).without(within).is_ok());
            }
        }
    }

    #[test]
    fn display_escapes_controls() {
        for (name, shown) in
            [("a\u{1b}[2Jb", "a\\u{1b}[2Jb"), ("\u{202e}\\n\u{ad}", "\\u{202e}\\\\n\\u{ad}"), ("鍵 é", "鍵 é")]
        {
            assert_eq!(Key::new("", name).unwrap().to_string(), shown);
        }
    }
}
