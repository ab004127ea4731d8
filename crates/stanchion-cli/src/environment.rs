//! The names of the tool's environment variables.

/// URL of the store.
pub(crate) const STORE: &str = "STANCHION_STORE";
/// A file whose first line is the URL of the store.
pub(crate) const STORE_FILE: &str = "STANCHION_STORE_FILE";
/// Given to the command: the key.
pub(crate) const KEY: &str = "STANCHION_KEY";
/// Given to the command: the fence, a plain decimal number.
pub(crate) const FENCE: &str = "STANCHION_FENCE";
/// Given to a shell by `acquire --export`, and read by `extend` and `release`: the token of a hold, which is a secret.
pub(crate) const TOKEN: &str = "STANCHION_TOKEN";
/// Variables that the command does not get as they are: the URL may hold a password.
pub(crate) const NOT_FOR_CHILDREN: [&str; 2] = [STORE, STORE_FILE];
