//! Keys: the names of the things that are locked.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use unicode_normalization::{UnicodeNormalization, is_nfc};

use crate::error::{Error, ErrorKind};
use crate::printable::is_printable;

/// The name of a thing that one at a time may do, with its namespace.
///
/// - 1 to 512 bytes of UTF-8 in Unicode normal form C: a composed and a decomposed spelling are the same key.
///   Nothing else is folded: case, spaces and look-alikes stay different.
/// - No NUL. Every other character is allowed, `/`, `:`, `{}` and `..` included.
/// - A namespace and a name are joined injectively: no two pairs give the same key.
///
/// Keys are checked here, once. A store only encodes them.
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
    /// `<length of the namespace in bytes>:<namespace><name>`, or the name alone after `:` without a namespace.
    text: Arc<str>,
    name_at: u16,
}

/// The longest name of a key, in bytes.
pub const MAX_KEY_BYTES: usize = 512;

/// The longest namespace, in bytes.
pub const MAX_NAMESPACE_BYTES: usize = 128;

/// What the namespaces begin with that the library keeps for itself.
const RESERVED: char = '\u{1}';

impl Key {
    /// The key `name` in `namespace` (empty: no namespace).
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if the name is empty, longer than [`MAX_KEY_BYTES`] or holds a NUL, or if the
    /// namespace is longer than [`MAX_NAMESPACE_BYTES`], holds a NUL or begins with U+0001.
    pub fn new(namespace: &str, name: &str) -> Result<Self, Error> {
        let namespace = normal(namespace);
        check_namespace(&namespace)?;
        Self::join(&namespace, name)
    }

    /// The key that the library keeps for this one, for a purpose of its own. No user's key is equal to it.
    pub(crate) fn companion(&self, purpose: &str) -> Result<Self, Error> {
        Self::join(&format!("{RESERVED}{purpose}/{}", self.namespace()), self.name())
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
            return Err(invalid("a key may not hold a NUL character".into()));
        }
        Ok(Self::joined(namespace, &name))
    }

    fn joined(namespace: &str, name: &str) -> Self {
        let mut text = namespace_prefix(namespace);
        let name_at = text.len() as u16;
        text.push_str(name);
        Self { text: text.into(), name_at }
    }

    /// The key whose name is all of this one, in another namespace.
    pub(crate) fn within(&self, namespace: &str) -> Self {
        Self::joined(namespace, self.as_encoded())
    }

    /// The key that is this one within the namespace.
    pub(crate) fn without(&self, namespace: &str) -> Result<Self, Error> {
        match self.as_encoded().strip_prefix(&namespace_prefix(namespace)) {
            Some(text) => Self::from_encoded(text),
            None => Err(malformed()),
        }
    }

    /// Reads back a key from [`Key::as_encoded`], for stores that keep it as text.
    ///
    /// # Errors
    /// [`ErrorKind::Internal`] if the text was not made by [`Key::as_encoded`].
    pub fn from_encoded(text: &str) -> Result<Self, Error> {
        let (length, rest) = text.split_once(':').ok_or_else(malformed)?;
        // No namespace, the library's own included, is longer than this type can tell.
        let length: u8 = if length.is_empty() { 0 } else { length.parse().map_err(|_| malformed())? };
        let (namespace, name) = rest.split_at_checked(length.into()).ok_or_else(malformed)?;
        // It was checked when it was made, and a key within a namespace may be longer than a user's.
        let key = Self::joined(namespace, name);
        if name.is_empty() || key.as_encoded() != text { Err(malformed()) } else { Ok(key) }
    }

    /// The whole key as one text, with its namespace: what a store keeps. Injective.
    pub fn as_encoded(&self) -> &str {
        &self.text
    }

    /// The name, without the namespace.
    pub fn name(&self) -> &str {
        &self.text[usize::from(self.name_at)..]
    }

    /// The namespace, empty if there is none.
    pub fn namespace(&self) -> &str {
        let prefix = &self.text[..usize::from(self.name_at)];
        prefix.split_once(':').map_or("", |(_, namespace)| namespace)
    }
}

/// Refuses what is no namespace for users.
pub(crate) fn check_namespace(namespace: &str) -> Result<(), Error> {
    if namespace.len() > MAX_NAMESPACE_BYTES {
        let length = namespace.len();
        return Err(invalid(format!("the namespace has {length} bytes, the longest allowed is {MAX_NAMESPACE_BYTES}")));
    }
    if namespace.contains('\0') || namespace.starts_with(RESERVED) {
        return Err(invalid("a namespace may not hold a NUL character nor begin with U+0001".into()));
    }
    Ok(())
}

/// The part of an encoded key that every key of a namespace begins with, and no other key does.
pub(crate) fn namespace_prefix(namespace: &str) -> String {
    if namespace.is_empty() { ":".into() } else { format!("{}:{namespace}", namespace.len()) }
}

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
    /// The name, with everything escaped that a terminal, a log or a reader is fooled by, and the backslash.
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
    fn a_name_of_512_bytes_is_accepted_and_513_are_not() {
        assert!(Key::new("", &"x".repeat(512)).is_ok());
        assert_eq!(Key::new("", &"x".repeat(513)).unwrap_err().kind(), ErrorKind::InvalidArgument);
        // Bytes count, not characters.
        assert!(Key::new("", &"é".repeat(256)).is_ok());
        assert!(Key::new("", &"é".repeat(257)).is_err());
    }

    #[test]
    fn namespaces_and_names_are_joined_injectively() {
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
    fn what_the_library_keeps_for_itself_is_no_users_key() {
        let longest = "n".repeat(MAX_NAMESPACE_BYTES);
        for (namespace, name) in [("", "a"), ("billing", "a"), (longest.as_str(), "a")] {
            let key = Key::new(namespace, name).unwrap();
            let companion = key.companion("runs").unwrap();
            assert_eq!(Key::from_encoded(companion.as_encoded()).unwrap(), companion);
            assert!(Key::new(companion.namespace(), name).is_err(), "a user cannot name it");
            assert!(!companion.as_encoded().starts_with(&namespace_prefix(namespace)), "it is not listed with the key");
        }
        let companions = [("", "a"), ("", "b"), ("a", "b"), ("a/", "b")]
            .map(|(namespace, name)| Key::new(namespace, name).unwrap().companion("runs").unwrap());
        assert!((1..4).all(|at| !companions[..at].contains(&companions[at])));
        assert!(Key::new("\u{1}", "a").is_err() && Key::new("", "\u{1}").is_ok());
    }

    #[test]
    fn an_encoded_key_is_read_back_whole() {
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
    fn a_key_within_a_namespace_is_read_back_whole() {
        let longest = (&*"n".repeat(MAX_NAMESPACE_BYTES), &*"x".repeat(MAX_KEY_BYTES));
        // The name of the third begins with an accent for whatever comes before it.
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
    fn a_key_is_printed_without_control_characters() {
        for (name, shown) in
            [("a\u{1b}[2Jb", "a\\u{1b}[2Jb"), ("\u{202e}\\n\u{ad}", "\\u{202e}\\\\n\\u{ad}"), ("鍵 é", "鍵 é")]
        {
            assert_eq!(Key::new("", name).unwrap().to_string(), shown);
        }
    }
}
