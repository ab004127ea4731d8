//! The conformance suite that decides what a stanchion store is.
