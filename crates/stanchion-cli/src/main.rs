//! `stanchion`: one command at a time, across processes and machines.
fn main() {}
