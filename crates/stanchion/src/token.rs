//! Defines the identities of sessions and holds, 128 bits each, and the detached [`Token`].
//!
//! A session id is random. A token id has 96 random bits, and 32 bits that mark the session that made it.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasherDefault, DefaultHasher, Hash as _, Hasher};
use std::str::FromStr;

use crate::error::{Error, ErrorKind, Result};
use crate::key::Key;

macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name([u8; 16]);

        impl $name {
            /// Returns a new id from the operating system's randomness.
            ///
            /// # Errors
            /// [`ErrorKind::Internal`] if the operating system has no randomness to give.
            pub fn random() -> Result<Self> {
                crate::clock::random_bytes().map(Self)
            }

            /// Creates an id from its 16 bytes, as a store keeps them.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// Returns the 16 bytes.
            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }

            /// Returns the id as 32 lowercase hexadecimal digits.
            pub fn to_hex(&self) -> String {
                let mut text = String::with_capacity(32);
                self.write_hex(&mut text);
                text
            }

            /// Appends the text of [`to_hex`](Self::to_hex).
            pub(crate) fn write_hex(&self, text: &mut String) {
                const DIGITS: &[u8; 16] = b"0123456789abcdef";
                let mut digits = [0; 32];
                for (two, byte) in digits.chunks_exact_mut(2).zip(self.0) {
                    two[0] = DIGITS[usize::from(byte >> 4)];
                    two[1] = DIGITS[usize::from(byte & 15)];
                }
                text.push_str(std::str::from_utf8(&digits).unwrap_or_default());
            }

            /// Reads an id from 32 hexadecimal digits. Returns `None` for any other text.
            pub fn from_hex(text: &str) -> Option<Self> {
                if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return None;
                }
                let mut bytes = [0; 16];
                for (i, byte) in bytes.iter_mut().enumerate() {
                    *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
                }
                Some(Self(bytes))
            }
        }

        impl fmt::Debug for $name {
            /// Shows the first six digits only, because anybody with the whole token can release its hold.
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({}…)"), &self.to_hex()[..6])
            }
        }
    };
}

random_id! {
    /// The identity of one call to acquire. Only a retry of that very call uses it again.
    TokenId
}

random_id! {
    /// The identity of a session, by which a process proves to a store that it lives.
    SessionId
}

/// Makes the tokens of a handle, and recognises them later without remembering them.
///
/// Part of each token depends on its session and on a secret of this handle. Without asking the store, the handle can
/// therefore tell its tokens from the tokens of other handles and of its own former sessions.
pub(crate) struct TokenMaker {
    secret: [u8; 16],
}

impl fmt::Debug for TokenMaker {
    /// Without the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenMaker")
    }
}

/// Number of random bytes in a token id. The other bytes are the mark.
const RANDOM: usize = 12;

impl TokenMaker {
    /// Makes a secret of the operating system's randomness.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self { secret: crate::clock::random_bytes()? })
    }

    pub(crate) fn make(&self, session: SessionId) -> Result<TokenId> {
        let mut bytes = crate::clock::random_bytes()?;
        let mark = self.mark(session, &bytes);
        bytes[RANDOM..].copy_from_slice(&mark);
        Ok(TokenId(bytes))
    }

    pub(crate) fn has_made(&self, token: TokenId, session: SessionId) -> bool {
        token.0[RANDOM..] == self.mark(session, &token.0)
    }

    fn mark(&self, session: SessionId, bytes: &[u8; 16]) -> [u8; 4] {
        let mut hasher = DefaultHasher::new();
        (self.secret, session, &bytes[..RANDOM]).hash(&mut hasher);
        let [a, b, c, d, ..] = hasher.finish().to_le_bytes();
        [a, b, c, d]
    }
}

/// A map whose keys are token ids or session ids.
pub(crate) type IdMap<Id, Value> = HashMap<Id, Value, BuildHasherDefault<IdHasher>>;

/// Uses an id, which is random already, as its own hash. Every operation looks up a token several times.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct IdHasher(u64);

impl Hasher for IdHasher {
    fn write(&mut self, bytes: &[u8]) {
        for eight in bytes.chunks_exact(8) {
            self.0 ^= eight.try_into().map_or(0, u64::from_ne_bytes);
        }
    }

    /// Ignores the length, because all ids have 16 bytes.
    fn write_usize(&mut self, _length: usize) {}

    fn finish(&self) -> u64 {
        self.0
    }
}

/// The identity of a detached hold. With it [`Locks::adopt`](crate::Locks::adopt) takes the hold over, here or in
/// another process, and [`Locks::release`](crate::Locks::release) and [`Locks::extend`](crate::Locks::extend) change it
/// from outside.
///
/// Its text form (`to_string` and `parse`) can be stored or sent. Keep it secret: anybody with a token can release its
/// hold. `Debug` hides it.
///
/// ```
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// # let locks = stanchion::Locks::open("memory:").await?;
/// let text = locks.lock("upload:7").await?.detach().to_string();
/// let token: stanchion::Token = text.parse()?;
/// assert_eq!(token.key().name(), "upload:7");
/// # Ok::<(), stanchion::Error>(()) }).unwrap();
/// ```
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Token {
    pub(crate) key: Key,
    pub(crate) id: TokenId,
    pub(crate) session: SessionId,
}

impl Token {
    pub(crate) fn new(key: Key, id: TokenId, session: SessionId) -> Self {
        Self { key, id, session }
    }

    /// Returns the key of the hold.
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// Returns the identity of the hold.
    pub fn id(&self) -> TokenId {
        self.id
    }

    /// Returns the session that made the hold. [`Locks::status`](crate::Locks::status) uses it to tell whether its
    /// process lives.
    pub fn session(&self) -> SessionId {
        self.session
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.id.to_hex(), self.session.to_hex(), self.key.as_encoded())
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({:?}, {:?})", self.key, self.id)
    }
}

impl FromStr for Token {
    type Err = Error;

    /// Reads the text form of a token.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if the text is not the text form of a token.
    fn from_str(text: &str) -> Result<Self> {
        let parse = || {
            let (id, rest) = text.split_once('.')?;
            let (session, key) = rest.split_once('.')?;
            let key = Key::from_encoded(key).ok()?;
            Some(Self { id: TokenId::from_hex(id)?, session: SessionId::from_hex(session)?, key })
        };
        parse().ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidArgument,
                "this is not a token: expected the text form of a detached guard's token",
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_round_trips_and_hides_in_debug() {
        let token =
            Token::new(Key::new("ns", "a.b").unwrap(), TokenId::random().unwrap(), SessionId::random().unwrap());
        let text = token.to_string();
        assert_eq!(text.parse::<Token>().unwrap(), token);
        let debug = format!("{token:?}");
        assert!(!debug.contains(&token.id.to_hex()) && !debug.contains(&token.session.to_hex()));
    }

    #[test]
    fn id_hashes_spread_over_a_table() {
        use std::hash::BuildHasher as _;
        let hasher = BuildHasherDefault::<IdHasher>::default();
        let ids = (0..16).map(|at| TokenId::from_bytes(std::array::from_fn(|byte| u8::from(byte == at))));
        let mut hashes: Vec<_> = ids.map(|id| hasher.hash_one(id)).collect();
        hashes.sort_unstable();
        hashes.dedup();
        assert_eq!(hashes.len(), 8, "each byte of each half affects the hash");
        let random: Vec<_> = (0..1_000).map(|_| hasher.hash_one(TokenId::random().unwrap())).collect();
        // A hash table uses the lowest bits for the slot and the highest bits for the first comparison.
        for bits in [|hash: u64| hash & 127, |hash: u64| hash >> 57] {
            let places: std::collections::HashSet<_> = random.iter().map(|hash| bits(*hash)).collect();
            assert!(places.len() > 100, "{} of 128", places.len());
        }
    }

    #[test]
    fn handle_recognises_tokens_of_its_session() {
        let (maker, other) = (TokenMaker::new().unwrap(), TokenMaker::new().unwrap());
        let [session, next] = [(); 2].map(|()| SessionId::random().unwrap());
        for _ in 0..1_000 {
            let token = maker.make(session).unwrap();
            assert!(maker.has_made(token, session));
            assert!(!maker.has_made(token, next) && !other.has_made(token, session));
            assert!(!maker.has_made(TokenId::random().unwrap(), session));
        }
    }

    #[test]
    fn malformed_tokens_are_rejected() {
        let long_id = format!("{}.:k", "0".repeat(33));
        for text in [
            "",
            "abc",
            "zz.:k",
            long_id.as_str(),
            "00000000000000000000000000000000",
            "+0000000000000000000000000000000.:k",
        ] {
            assert_eq!(text.parse::<Token>().unwrap_err().kind(), ErrorKind::InvalidArgument, "{text:?}");
        }
    }
}
