//! Parses the options of the attribute.

use std::time::Duration;

use proc_macro2::{Span, TokenStream};
use quote::{ToTokens, quote};
use syn::ext::IdentExt as _;
use syn::parse::{Parse, ParseStream};
use syn::{Error, Expr, Ident, LitStr, Result, Token};

/// The parsed options. Each may appear at most once.
#[derive(Default)]
pub(crate) struct Options {
    pub(crate) key: Option<Text>,
    pub(crate) locks: Option<Expr>,
    pub(crate) guard: Option<Ident>,
    /// Method and argument for each option that becomes a call on the lock request.
    pub(crate) calls: Vec<(Ident, TokenStream)>,
}

/// The value of an option: a string literal, or any other expression.
pub(crate) enum Text {
    Literal(LitStr),
    Expression(Expr),
}

const NAMES: &str = "key, locks, wait, try, cooldown, max_hold, ttl, linger, read, write, guard";

/// Pairs of options that exclude each other, and the reason.
const ONE_OF: [(&str, &str, &str); 3] = [
    ("wait", "try", "`try` does not wait"),
    ("read", "write", "a lock is shared or exclusive"),
    ("ttl", "max_hold", "a fixed lifetime ends by itself"),
];

impl Parse for Options {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        let mut options = Self::default();
        let mut seen: Vec<Ident> = Vec::new();
        while !input.is_empty() {
            // `Ident::parse` would reject `try`, which is a keyword.
            let name = input.call(Ident::parse_any)?;
            let text = name.to_string();
            if seen.contains(&name) {
                return Err(Error::new(name.span(), format!("option `{text}` appears twice")));
            }
            for (one, other, why) in ONE_OF {
                let also = if text == one { other } else { one };
                if (text == one || text == other) && seen.iter().any(|seen| seen == also) {
                    return Err(Error::new(name.span(), format!("`{text}` and `{also}` exclude each other: {why}")));
                }
            }
            options.option(&name, &text, input)?;
            seen.push(name);
            if !input.is_empty() {
                input.parse::<Token![,]>()?;
            }
        }
        if options.key.is_none() {
            let message = "the key is missing: write `key = \"file:{id}\"`, where `id` is an argument";
            return Err(Error::new(Span::call_site(), message));
        }
        Ok(options)
    }
}

impl Options {
    fn option(&mut self, name: &Ident, text: &str, input: ParseStream<'_>) -> Result<()> {
        let mut call = |method: &str, argument| self.calls.push((Ident::new(method, name.span()), argument));
        match text {
            "key" => self.key = Some(value(name, input)?),
            "locks" => self.locks = Some(expression(name, input)?),
            "guard" => {
                equals(name, input)?;
                self.guard = Some(input.parse()?);
            }
            "wait" | "cooldown" | "max_hold" | "ttl" | "linger" => call(text, duration(value(name, input)?)?),
            "try" => call("wait", quote!(::core::time::Duration::ZERO)),
            "read" => call("demand", quote!(::stanchion::Demand::READ)),
            "write" => call("demand", quote!(::stanchion::Demand::WRITE)),
            _ => {
                return Err(Error::new(name.span(), format!("there is no option `{text}`; the options are {NAMES}")));
            }
        }
        Ok(())
    }
}

fn equals(name: &Ident, input: ParseStream<'_>) -> Result<()> {
    if input.peek(Token![=]) {
        return input.parse::<Token![=]>().map(drop);
    }
    Err(Error::new(name.span(), format!("`{name}` needs a value: `{name} = …`")))
}

fn expression(name: &Ident, input: ParseStream<'_>) -> Result<Expr> {
    equals(name, input)?;
    input.parse()
}

fn value(name: &Ident, input: ParseStream<'_>) -> Result<Text> {
    Ok(match expression(name, input)? {
        Expr::Lit(syn::ExprLit { lit: syn::Lit::Str(literal), .. }) => Text::Literal(literal),
        other => Text::Expression(other),
    })
}

fn duration(value: Text) -> Result<TokenStream> {
    let literal = match value {
        Text::Literal(literal) => literal,
        Text::Expression(Expr::Lit(number)) => {
            return Err(Error::new_spanned(
                number,
                "a duration must be a string such as \"5s\", or an expression of type `Duration`",
            ));
        }
        Text::Expression(expression) => return Ok(expression.into_token_stream()),
    };
    let span: Option<Duration> = crate::duration::parse(&literal.value());
    let micros = span.and_then(|span| u64::try_from(span.as_micros()).ok());
    match micros {
        Some(micros) => Ok(quote!(::core::time::Duration::from_micros(#micros))),
        None => {
            let message = format!(
                "`{}` is not a duration: write a number with a unit (500ms, 30s, 5m, 2h, 1d, 1h 30m) or seconds (30, 1.5)",
                literal.value()
            );
            Err(Error::new(literal.span(), message))
        }
    }
}
