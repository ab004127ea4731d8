//! What the compiler says to mistakes in the attribute. `TRYBUILD=overwrite` writes the expected texts anew.

#[test]
fn mistakes_are_told_where_they_are() {
    trybuild::TestCases::new().compile_fail("tests/ui/*.rs");
}
