//! Checks the compiler's messages for mistakes in the attribute. `TRYBUILD=overwrite` rewrites the expected messages.

#[test]
fn mistakes_are_reported_in_place() {
    trybuild::TestCases::new().compile_fail("tests/ui/*.rs");
}
