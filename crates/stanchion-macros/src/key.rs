//! The key: a text with placeholders that name arguments.

use proc_macro2::TokenStream;
use quote::quote_spanned;
use syn::{Error, Expr, LitStr, Member, Result};

/// What makes the key of a text, in a function with these arguments; `self` is one of them.
pub(crate) fn expand(literal: &LitStr, arguments: &[String]) -> Result<TokenStream> {
    let text = literal.value();
    let wrong = |message: String| Error::new(literal.span(), message);
    if text.is_empty() {
        return Err(wrong("the key is empty".to_owned()));
    }
    let mut format = String::new();
    let mut values: Vec<Expr> = Vec::new();
    let mut rest = text.as_str();
    while let Some(at) = rest.find(['{', '}']) {
        let (plain, from) = rest.split_at(at);
        format.push_str(plain);
        if let Some(after) = from.strip_prefix("{{").or_else(|| from.strip_prefix("}}")) {
            // Escaped for `format!` as it is here.
            format.push_str(&from[..2]);
            rest = after;
            continue;
        }
        let inside = from.strip_prefix('{').and_then(|from| from.split_once('}'));
        let Some((name, after)) = inside else {
            return Err(wrong("a brace has no partner; a brace of the key itself is written twice".to_owned()));
        };
        format.push_str("{}");
        values.push(placeholder(name, literal, arguments)?);
        rest = after;
    }
    format.push_str(rest);
    let format = LitStr::new(&format, literal.span());
    Ok(quote_spanned!(literal.span()=> ::std::format!(#format, #(#values),*)))
}

/// An argument, or a field of one, or of that.
fn placeholder(name: &str, literal: &LitStr, arguments: &[String]) -> Result<Expr> {
    let wrong = |message: String| Error::new(literal.span(), message);
    let shape = format!("`{{{name}}}` names no argument: write `{{id}}`, `{{self.name}}`, `{{request.id}}`");
    // Parsed at the literal, so that an error in it points there.
    let expression: Expr = LitStr::new(name, literal.span()).parse().map_err(|_| wrong(shape.clone()))?;
    let Some(root) = root(&expression) else { return Err(wrong(shape)) };
    if arguments.contains(&root) {
        return Ok(expression);
    }
    Err(wrong(match (root.as_str(), arguments) {
        ("self", _) => format!("`{{{name}}}` in a function that has no `self`"),
        (_, []) => format!("there is no argument `{root}`: the function has none"),
        (_, some) => format!("there is no argument `{root}`; there are `{}`", some.join("`, `")),
    }))
}

/// The variable of `variable.field.0`; none for anything else.
fn root(expression: &Expr) -> Option<String> {
    match expression {
        Expr::Path(path) => path.path.get_ident().map(ToString::to_string),
        Expr::Field(field) => match &field.member {
            Member::Named(_) | Member::Unnamed(_) => root(&field.base),
        },
        _ => None,
    }
}
