//! Loads the scripts, each of which is one operation, and builds the names of the Redis keys that they use.

use std::sync::OnceLock;

use redis::{Arg, Cmd};

use crate::error::{Error, ErrorKind, Result};
use crate::key::Key;
use crate::token::SessionId;

/// Number of arguments and bytes to reserve for a command, so that the usual ones are never reallocated.
const USUAL_ARGUMENTS: usize = 8;
const USUAL_BYTES: usize = 512;

/// A script, which the server runs atomically.
#[derive(Debug)]
pub(super) struct Script {
    source: &'static str,
    hash: OnceLock<String>,
}

/// Builds the script of an operation on a key. A fast path for the most frequent case comes first.
macro_rules! on_key {
    ($name:literal) => {
        on_key!("scripts/load.lua", $name)
    };
    ($beginning:literal, $name:literal) => {
        Script::new(concat!(include_str!($beginning), include_str!("scripts/common.lua"), include_str!($name)))
    };
}

macro_rules! on_session {
    ($name:literal) => {
        Script::new(include_str!($name))
    };
}

pub(super) static ACQUIRE: Script = on_key!("scripts/acquire.fast.lua", "scripts/acquire.lua");
pub(super) static END: Script = on_key!("scripts/end.fast.lua", "scripts/end.lua");
pub(super) static BATCH: Script = Script::new(include_str!("scripts/batch.lua"));
pub(super) static POLL: Script = on_key!("scripts/poll.lua");
pub(super) static EXTEND: Script = on_key!("scripts/extend.lua");
pub(super) static LINGER: Script = on_key!("scripts/linger.lua");
pub(super) static ADOPT: Script = on_key!("scripts/adopt.lua");
pub(super) static FORCE_RELEASE: Script = on_key!("scripts/force_release.lua");
pub(super) static REAP: Script = on_key!("scripts/reap.lua");
pub(super) static INSPECT: Script = on_key!("scripts/inspect.lua");
pub(super) static TOUCH: Script = on_key!("scripts/touch.lua");
/// Publishes to a session's channel, from a script as all messages are sent.
pub(super) static PUBLISH: Script = Script::new("return redis.call('PUBLISH', KEYS[1], '')");
pub(super) static SESSION_OPEN: Script = on_session!("scripts/session_open.lua");
pub(super) static SESSION_RENEW: Script = on_session!("scripts/session_renew.lua");
pub(super) static SESSION_CLOSE: Script = on_session!("scripts/session_close.lua");
pub(super) static SESSION_REMAINING: Script = on_session!("scripts/session_remaining.lua");
pub(super) static SESSION_LOSSES: Script = on_session!("scripts/session_losses.lua");

impl Script {
    const fn new(source: &'static str) -> Self {
        Self { source, hash: OnceLock::new() }
    }

    /// Returns the command that runs the script by its hash. The caller adds keys and arguments.
    pub(super) fn by_hash(&self, keys: usize) -> Cmd {
        let mut command = Cmd::with_capacity(USUAL_ARGUMENTS, USUAL_BYTES);
        command.arg("EVALSHA");
        let hash = self.hash.get_or_init(|| redis::Script::new(self.source).get_hash().to_owned());
        command.arg(hash.as_str()).arg(keys);
        command
    }

    /// Returns the same command with the script's text, for a server that does not have the script.
    pub(super) fn by_text(&self, by_hash: &Cmd) -> Cmd {
        let mut command = redis::cmd("EVAL");
        command.arg(self.source);
        for argument in by_hash.args_iter().skip(2) {
            if let Arg::Simple(bytes) = argument {
                command.arg(bytes);
            }
        }
        command
    }
}

/// Builds the names of a store's Redis keys: `<prefix>:{<key>}`, the same with `:queue` and `:waiting`, and
/// `<prefix>:session:{<id>}`.
///
/// The part in braces decides the slot in a cluster, so all Redis keys of one lock are together. No two locks share a
/// name: a prefix has no brace, and `%` and `}` in a key are written as `%25` and `%7D`.
#[derive(Clone, Debug)]
pub(super) struct Names {
    prefix: String,
}

/// The names of the Redis keys of one lock.
#[derive(Clone, Debug)]
pub(super) struct LockNames {
    /// Has the form `R:queueR:waiting`, where R is the name of the record.
    names: String,
    record: usize,
}

const QUEUE: &str = ":queue";
const WAITING: &str = ":waiting";

impl LockNames {
    pub(super) fn record(&self) -> &str {
        &self.names[..self.record]
    }

    /// Returns the names in the order that the scripts expect.
    pub(super) fn all(&self) -> [&str; 3] {
        let (queue, waiting) = self.names.split_at(self.record + QUEUE.len());
        [self.record(), queue, waiting]
    }
}

impl Names {
    pub(super) fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    pub(super) fn lock(&self, key: &Key) -> LockNames {
        let text = key.as_encoded();
        let mut names = String::with_capacity(2 * (self.prefix.len() + text.len() + 3) + QUEUE.len() + WAITING.len());
        names.push_str(&self.prefix);
        names.push_str(":{");
        escape(text, &mut names);
        names.push('}');
        let record = names.len();
        names.push_str(QUEUE);
        names.extend_from_within(..record);
        names.push_str(WAITING);
        LockNames { names, record }
    }

    /// Returns the key of a record's name; `None` if the name belongs to something else.
    pub(super) fn key_of(&self, record: &str) -> Option<Result<Key>> {
        let inner = record.strip_prefix(&self.prefix)?.strip_prefix(":{")?.strip_suffix('}')?;
        Some(unescape(inner).and_then(|text| Key::from_encoded(&text)))
    }

    /// Returns a pattern that matches at least the records of all keys with this prefix.
    pub(super) fn pattern(&self, prefix: &str) -> String {
        let mut name = format!("{}:{{", self.prefix);
        escape(prefix, &mut name);
        let mut pattern = String::with_capacity(name.len() + 8);
        for character in name.chars() {
            if matches!(character, '*' | '?' | '[' | ']' | '\\' | '^' | '-') {
                pattern.push('\\');
            }
            pattern.push(character);
        }
        pattern + "*}"
    }

    /// Returns the name of a session's Redis key and channel.
    pub(super) fn session(&self, session: SessionId) -> String {
        format!("{}:session:{{{}}}", self.prefix, session.to_hex())
    }
}

fn escape(text: &str, into: &mut String) {
    if !text.bytes().any(|byte| matches!(byte, b'%' | b'}')) {
        return into.push_str(text);
    }
    for character in text.chars() {
        match character {
            '%' => into.push_str("%25"),
            '}' => into.push_str("%7D"),
            other => into.push(other),
        }
    }
}

fn unescape(text: &str) -> Result<String> {
    let malformed = || Error::new(ErrorKind::Internal, "the store contains a malformed key");
    let mut parts = text.split('%');
    let mut unescaped = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (character, rest) = match (part.strip_prefix("25"), part.strip_prefix("7D")) {
            (Some(rest), _) => ('%', rest),
            (_, Some(rest)) => ('}', rest),
            _ => return Err(malformed()),
        };
        unescaped.push(character);
        unescaped.push_str(rest);
    }
    Ok(unescaped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_lead_back_to_keys() {
        let names = Names::new("stanchion");
        let all = ["a", "}", "{", "{}", "%", "%7D", "a}:queue", "session:{1}", "a{b}c", "%25", "ä}"];
        let mut seen = std::collections::HashSet::new();
        for (namespace, name) in all.iter().flat_map(|name| [("", *name), ("}n", *name)]) {
            let key = Key::new(namespace, name).unwrap();
            let lock = names.lock(&key);
            assert_eq!(names.key_of(lock.record()).unwrap().unwrap(), key);
            for name in lock.all() {
                assert!(seen.insert(name.to_owned()), "{name}");
                let tag = name.split_once('{').unwrap().1.split_once('}').unwrap().0;
                assert!(!tag.is_empty() && lock.record().ends_with(&format!("{{{tag}}}")), "one slot: {name}");
            }
        }
        assert!(names.key_of("stanchion:session:{1}").is_none());
    }
}
