//! The scripts, one step each, and the names of the keys that they are given.

use std::sync::OnceLock;

use redis::{Arg, Cmd};

use crate::error::{Error, ErrorKind, Result};
use crate::key::Key;
use crate::token::SessionId;

/// What the commonest commands have room in, so that they are not moved while they are written.
const ARGUMENTS: usize = 8;
const BYTES: usize = 512;

/// A script: one atomic step on the server.
#[derive(Debug)]
pub(super) struct Script {
    source: &'static str,
    hash: OnceLock<String>,
}

/// The script of a step on a key. Where there is a short way for the commonest case, it comes first.
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
pub(super) static ADOPT: Script = on_key!("scripts/adopt.lua");
pub(super) static EVICT: Script = on_key!("scripts/evict.lua");
pub(super) static BURY: Script = on_key!("scripts/bury.lua");
pub(super) static INSPECT: Script = on_key!("scripts/inspect.lua");
pub(super) static TOUCH: Script = on_key!("scripts/touch.lua");
/// A message to a session, as scripts send them.
pub(super) static PUBLISH: Script = Script::new("return redis.call('PUBLISH', KEYS[1], '')");
pub(super) static SESSION_OPEN: Script = on_session!("scripts/session_open.lua");
pub(super) static SESSION_BEAT: Script = on_session!("scripts/session_beat.lua");
pub(super) static SESSION_CLOSE: Script = on_session!("scripts/session_close.lua");
pub(super) static SESSION_LOOK: Script = on_session!("scripts/session_look.lua");
pub(super) static SESSION_LOST: Script = on_session!("scripts/session_lost.lua");

impl Script {
    const fn new(source: &'static str) -> Self {
        Self { source, hash: OnceLock::new() }
    }

    /// The command that runs it by its hash; keys and arguments are to be added.
    pub(super) fn by_hash(&self, keys: usize) -> Cmd {
        let mut command = Cmd::with_capacity(ARGUMENTS, BYTES);
        command.arg("EVALSHA");
        let hash = self.hash.get_or_init(|| redis::Script::new(self.source).get_hash().to_owned());
        command.arg(hash.as_str()).arg(keys);
        command
    }

    /// The same command with the script's text, for a server that does not know it yet.
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

/// How the keys of a store are called: `<prefix>:{<key>}`, the same with `:queue` and `:waiting`, and
/// `<prefix>:session:{<id>}`.
///
/// What is in braces decides the slot in a cluster, so the keys of one lock are together. Injective: a prefix has no
/// brace, and in a key `%` and `}` are written as `%25` and `%7D`.
#[derive(Clone, Debug)]
pub(super) struct Names {
    prefix: String,
}

/// The names of the keys of one lock.
#[derive(Clone, Debug)]
pub(super) struct LockNames {
    /// `R:queueR:waiting`, where R is the name of the record.
    names: String,
    record: usize,
}

const QUEUE: &str = ":queue";
const WAITING: &str = ":waiting";

impl LockNames {
    pub(super) fn record(&self) -> &str {
        &self.names[..self.record]
    }

    /// The keys, in the order of the scripts.
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

    /// The key of a record's name; none if it is the name of something else.
    pub(super) fn key_of(&self, record: &str) -> Option<Result<Key>> {
        let inner = record.strip_prefix(&self.prefix)?.strip_prefix(":{")?.strip_suffix('}')?;
        Some(unescape(inner).and_then(|text| Key::from_encoded(&text)))
    }

    /// A pattern that fits at least the records of all keys that begin so.
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

    /// The key of a session, which is the name of its channel too.
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
    let malformed = || Error::new(ErrorKind::Internal, "the store holds a malformed key");
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
    fn names_lead_back_to_their_keys_and_no_two_are_the_same() {
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
