//! The names of the tool's environment variables.

/// URL of the store.
pub(crate) const STORE: &str = "STANCHION_STORE";
/// A file whose first line is the URL of the store.
pub(crate) const STORE_FILE: &str = "STANCHION_STORE_FILE";
/// The namespace of the keys.
pub(crate) const NAMESPACE: &str = "STANCHION_NAMESPACE";
/// Given to the command: the key. Of several keys one a line.
pub(crate) const KEY: &str = "STANCHION_KEY";
/// Given to the command: the fence, a plain decimal number. Of several keys one a line, in the order of the keys.
pub(crate) const FENCE: &str = "STANCHION_FENCE";
/// Given to a shell by `acquire --export`, and read by `extend` and `release`: the token of a hold, which is a secret.
pub(crate) const TOKEN: &str = "STANCHION_TOKEN";
/// Variables that the command does not get as they are: the URL may hold a password, and the options of this process may
/// say something else.
pub(crate) const NOT_FOR_CHILDREN: [&str; 3] = [STORE, STORE_FILE, NAMESPACE];
