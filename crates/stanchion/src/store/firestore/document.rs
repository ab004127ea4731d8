//! Builds document names, field values and writes, and reads field values.

use std::collections::HashMap;

use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;
use prost_types::Timestamp;

use super::error::malformed;
use crate::error::Result;
use crate::key::Key;
use crate::token::{SessionId, TokenId};

/// Field of a notification that recalls a lingering hold: the time of the request that recalls it.
pub(super) const RECALLED_AT: &str = "recalled_at";

/// Names the store's documents and collections.
#[derive(Clone, Debug)]
pub(super) struct Names {
    /// `projects/…/databases/…/documents`.
    root: String,
    collection: String,
}

impl Names {
    pub(super) fn new(database: &str, collection: &str) -> Self {
        Self { root: format!("{database}/documents"), collection: collection.to_owned() }
    }

    /// Returns the parent of the top-level collections.
    pub(super) fn root(&self) -> &str {
        &self.root
    }

    pub(super) fn keys(&self) -> String {
        format!("{}_keys", self.collection)
    }

    pub(super) fn sessions(&self) -> String {
        format!("{}_sessions", self.collection)
    }

    /// Returns the name of the collection of notifications below each session's document.
    pub(super) fn notifications(&self) -> String {
        format!("{}_calls", self.collection)
    }

    pub(super) fn key(&self, key: &Key) -> String {
        format!("{}/{}/{}", self.root, self.keys(), key_id(key))
    }

    /// Returns the name of a queue page below this key's document.
    pub(super) fn page(&self, key: &str, number: u64) -> String {
        format!("{key}/{}_pages/{number}", self.collection)
    }

    pub(super) fn session(&self, session: SessionId) -> String {
        format!("{}/{}/{}", self.root, self.sessions(), session.to_hex())
    }

    pub(super) fn notification(&self, session: SessionId, token: TokenId) -> String {
        format!("{}/{}/{}", self.session(session), self.notifications(), token.to_hex())
    }
}

/// Returns the ID of a key's document: 8 hexadecimal digits that spread similar keys over the service's machines, and
/// then the key in base64url. IDs are unique per key and have at most 1,060 bytes, where Firestore allows 1,500.
pub(super) fn key_id(key: &Key) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let bytes = key.as_encoded().as_bytes();
    let mut id = format!("{:08x}.", spread(bytes) >> 32);
    for three in bytes.chunks(3) {
        let bits = three.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - three.len()));
        for place in 0..=three.len() {
            id.push(char::from(LETTERS[(bits >> (18 - 6 * place)) as usize & 63]));
        }
    }
    id
}

/// Hashes with FNV-1a and a finalizer, so that similar keys get distant numbers. Nothing depends on the hash being hard
/// to invert.
fn spread(bytes: &[u8]) -> u64 {
    let sum = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum: u64, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    let mixed = (sum ^ (sum >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    mixed ^ (mixed >> 33)
}

/// Converts a timestamp to microseconds, which is the service's precision.
pub(super) fn micros(time: Timestamp) -> Result<u64> {
    let seconds = u64::try_from(time.seconds).map_err(|_| malformed())?;
    let below = u64::try_from(time.nanos).map_err(|_| malformed())? / 1_000;
    Ok(seconds.saturating_mul(1_000_000).saturating_add(below))
}

/// Converts a timestamp that every response must contain.
pub(super) fn micros_of(time: Option<Timestamp>) -> Result<u64> {
    micros(time.ok_or_else(malformed)?)
}

pub(super) fn timestamp(micros: u64) -> api::Value {
    let seconds = i64::try_from(micros / 1_000_000).unwrap_or(i64::MAX);
    // This is below 1,000,000,000.
    let nanos = i32::try_from(micros % 1_000_000 * 1_000).unwrap_or_default();
    value(api::value::ValueType::TimestampValue(Timestamp { seconds, nanos }))
}

fn value(of: api::value::ValueType) -> api::Value {
    api::Value { value_type: Some(of) }
}

pub(super) fn text(text: impl Into<String>) -> api::Value {
    value(api::value::ValueType::StringValue(text.into()))
}

pub(super) fn bytes(bytes: Vec<u8>) -> api::Value {
    value(api::value::ValueType::BytesValue(bytes))
}

pub(super) fn ids(sessions: impl Iterator<Item = SessionId>) -> api::Value {
    value(api::value::ValueType::ArrayValue(api::ArrayValue { values: sessions.map(id).collect() }))
}

/// Encodes a session ID as bytes: text would be twice as long, and a key's document can contain 10,000 of them.
pub(super) fn id(session: SessionId) -> api::Value {
    bytes(session.as_bytes().to_vec())
}

pub(super) type Fields = HashMap<String, api::Value>;

/// Collects named values into a map.
pub(super) fn fields<const N: usize>(named: [(&str, api::Value); N]) -> Fields {
    named.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

pub(super) fn bytes_of<'a>(document: &'a api::Document, field: &str) -> Result<&'a [u8]> {
    match document.fields.get(field).and_then(|value| value.value_type.as_ref()) {
        Some(api::value::ValueType::BytesValue(bytes)) => Ok(bytes),
        _ => Err(malformed()),
    }
}

pub(super) fn text_of<'a>(document: &'a api::Document, field: &str) -> Result<&'a str> {
    match document.fields.get(field).and_then(|value| value.value_type.as_ref()) {
        Some(api::value::ValueType::StringValue(text)) => Ok(text),
        _ => Err(malformed()),
    }
}

/// Condition of a write. If one fails, the service rejects the whole commit.
#[derive(Clone, Copy, Debug)]
pub(super) enum WriteIf {
    Always,
    Missing,
    Present,
    /// The document still has this `update_time`.
    Unchanged(Timestamp),
}

fn precondition(write_if: WriteIf) -> Option<api::Precondition> {
    let condition = match write_if {
        WriteIf::Always => return None,
        WriteIf::Missing => api::precondition::ConditionType::Exists(false),
        WriteIf::Present => api::precondition::ConditionType::Exists(true),
        WriteIf::Unchanged(time) => api::precondition::ConditionType::UpdateTime(time),
    };
    Some(api::Precondition { condition_type: Some(condition) })
}

/// Returns a write that replaces the whole document.
pub(super) fn put(name: String, fields: Fields, write_if: WriteIf) -> api::Write {
    let document = api::Document { name, fields, create_time: None, update_time: None };
    api::Write {
        update_mask: None,
        update_transforms: Vec::new(),
        current_document: precondition(write_if),
        operation: Some(api::write::Operation::Update(document)),
    }
}

/// Returns a write that sets some fields of a document and removes others.
pub(super) fn merge(name: String, fields: Fields, removed: &[&str], write_if: WriteIf) -> api::Write {
    let changed = fields.keys().cloned().chain(removed.iter().map(|field| (*field).to_owned()));
    let mask = api::DocumentMask { field_paths: changed.collect() };
    api::Write { update_mask: Some(mask), ..put(name, fields, write_if) }
}

pub(super) fn delete(name: String, write_if: WriteIf) -> api::Write {
    api::Write {
        update_mask: None,
        update_transforms: Vec::new(),
        current_document: precondition(write_if),
        operation: Some(api::write::Operation::Delete(name)),
    }
}

/// Builds a query for the documents of a collection that satisfy all conditions on one field, optionally ordered by
/// that field.
pub(super) fn query(
    collection: String,
    field: &str,
    conditions: Vec<(api::structured_query::field_filter::Operator, api::Value)>,
    is_ordered: bool,
    limit: usize,
) -> api::StructuredQuery {
    use api::structured_query::{
        CollectionSelector, CompositeFilter, Direction, FieldFilter, FieldReference, Filter, Order, composite_filter,
        filter::FilterType,
    };
    let reference = || Some(FieldReference { field_path: field.to_owned() });
    let filters: Vec<Filter> = conditions
        .into_iter()
        .map(|(op, value)| {
            let filter = FieldFilter { field: reference(), op: op.into(), value: Some(value) };
            Filter { filter_type: Some(FilterType::FieldFilter(filter)) }
        })
        .collect();
    let all = CompositeFilter { op: composite_filter::Operator::And.into(), filters };
    let has_filters = !all.filters.is_empty();
    let order = Order { field: reference(), direction: Direction::Ascending.into() };
    api::StructuredQuery {
        from: vec![CollectionSelector { collection_id: collection, all_descendants: false }],
        r#where: has_filters.then_some(Filter { filter_type: Some(FilterType::CompositeFilter(all)) }),
        order_by: if is_ordered { vec![order] } else { Vec::new() },
        limit: Some(i32::try_from(limit).unwrap_or(i32::MAX)),
        ..api::StructuredQuery::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_ids_are_legal_and_unique() {
        let mut names: Vec<String> =
            ["/", ".", "..", "a/b", "__x__", "__id7__", "é", "鍵", "🔒", "a", "A", " ", "a ", "\u{7f}"]
                .map(str::to_owned)
                .into();
        names.push("x".repeat(crate::key::MAX_KEY_BYTES));
        names.extend((0..1_000).map(|i| format!("invoice:{i}")));
        let namespace = "n".repeat(128);
        let mut ids = std::collections::BTreeSet::new();
        for namespace in ["", "a", &namespace] {
            for name in &names {
                let id = key_id(&Key::new(namespace, name).unwrap());
                assert!(
                    id.len() <= 1_500 && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)),
                    "{id}"
                );
                assert!(!id.starts_with("__") && id != "." && id != "..");
                assert!(ids.insert(id), "{name}");
            }
        }
        let mut first_digits: Vec<u8> =
            (0..1_000).map(|i| key_id(&Key::new("", &format!("invoice:{i}")).unwrap()).as_bytes()[0]).collect();
        first_digits.sort_unstable();
        first_digits.dedup();
        assert_eq!(first_digits.len(), 16, "IDs of consecutive keys begin with all 16 digits");
    }

    #[test]
    fn timestamps_round_trip_in_microseconds() {
        let Some(api::value::ValueType::TimestampValue(time)) = timestamp(1_795_269_318_534_297).value_type else {
            panic!("a time")
        };
        assert_eq!(micros(time).unwrap(), 1_795_269_318_534_297);
        assert!(micros(Timestamp { seconds: -1, nanos: 0 }).is_err());
    }
}
