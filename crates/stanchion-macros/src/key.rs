//! Expands the key: a text with placeholders that name arguments.

use proc_macro2::TokenStream;
use quote::quote_spanned;
use syn::{Error, Expr, LitStr, Member, Result};

/// Returns the expression that makes the key from the text, in a function with these arguments. `self` is one of them.
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
            // `format!` uses the same escapes.
            format.push_str(&from[..2]);
            rest = after;
            continue;
        }
        let inside = from.strip_prefix('{').and_then(|from| from.split_once('}'));
        let Some((name, after)) = inside else {
            return Err(wrong("unmatched brace: write `{{` or `}}` for a brace in the key".to_owned()));
        };
        format.push_str("{}");
        values.push(placeholder(name, literal, arguments)?);
        rest = after;
    }
    format.push_str(rest);
    let format = LitStr::new(&format, literal.span());
    Ok(quote_spanned!(literal.span()=> ::std::format!(#format, #(#values),*)))
}

/// Parses a placeholder: an argument, or a field path that begins with one.
fn placeholder(name: &str, literal: &LitStr, arguments: &[String]) -> Result<Expr> {
    let wrong = |message: String| Error::new(literal.span(), message);
    let shape =
        format!("`{{{name}}}` is not an argument or a field: write `{{id}}`, `{{self.name}}`, `{{request.id}}`");
    // The span of the literal makes the compiler report errors in the placeholder there.
    let expression: Expr = LitStr::new(name, literal.span()).parse().map_err(|_| wrong(shape.clone()))?;
    let Some(root) = root(&expression) else { return Err(wrong(shape)) };
    if arguments.contains(&root) {
        return Ok(expression);
    }
    Err(wrong(match (root.as_str(), arguments) {
        ("self", _) => format!("`{{{name}}}` needs a `self` argument, which this function does not have"),
        (_, []) => format!("there is no argument `{root}`: the function has no arguments"),
        (_, some) => format!("there is no argument `{root}`; the arguments are `{}`", some.join("`, `")),
    }))
}

/// Returns the variable of `variable.field.0`, or `None` for any other expression.
fn root(expression: &Expr) -> Option<String> {
    match expression {
        Expr::Path(path) => path.path.get_ident().map(ToString::to_string),
        Expr::Field(field) => match &field.member {
            Member::Named(_) | Member::Unnamed(_) => root(&field.base),
        },
        _ => None,
    }
}
