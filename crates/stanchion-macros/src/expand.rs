//! Generates the function that takes the lock and runs the original body under it.

use proc_macro2::{Ident, Span, TokenStream};
use quote::{ToTokens, quote, quote_spanned};
use syn::spanned::Spanned as _;
use syn::visit::{self, Visit};
use syn::visit_mut::{self, VisitMut};
use syn::{Error, FnArg, ItemFn, Pat, Result, ReturnType, Signature, Type, parse_quote};

use crate::key;
use crate::options::{Options, Text};

pub(crate) fn locked(arguments: TokenStream, item: TokenStream) -> Result<TokenStream> {
    let options: Options = syn::parse2(arguments)?;
    let function: ItemFn = syn::parse2(item)
        .map_err(|mistake| Error::new(mistake.span(), "`locked` works only on functions and methods with a body"))?;
    let ItemFn { attrs, vis, sig, block } = &function;
    if sig.asyncness.is_none() {
        return Err(Error::new(sig.fn_token.span, "`locked` works only on async functions: write `async fn`"));
    }
    let output = result(sig)?;
    let names = names(sig);
    let locks = locks(&options, sig, &names)?;
    let key = match &options.key {
        Some(Text::Literal(literal)) => key::expand(literal, &names)?,
        Some(Text::Expression(expression)) => expression.into_token_stream(),
        None => TokenStream::new(),
    };
    let calls = options.calls.iter().map(|(method, argument)| quote_spanned!(method.span()=> .#method(#argument)));
    // Hygienic names cannot collide with the function's own names.
    let hygienic = |name: &str| Ident::new(name, Span::mixed_site());
    let (request, body, error) = (hygienic("request"), hygienic("body"), hygienic("error"));
    let guard = options.guard.unwrap_or_else(|| hygienic("_guard"));
    // The compiler reports an error type without `From<stanchion::Error>` at the return type. Lints do not treat the
    // conversion as the user's code.
    let at_output = sig.output.span().resolved_at(Span::mixed_site());
    let failed = quote_spanned!(at_output=> ::core::convert::From::from(#error));
    Ok(quote! {
        #(#attrs)* #vis #sig {
            let #request = ::stanchion::Locks::lock(&#locks, #key) #(#calls)*;
            let #body = async move |#guard: &::stanchion::Guard| {
                // This names the return type inside the body, so that the body is coerced to it as in the original
                // function. The return type of an async closure would not have that effect.
                #[allow(unreachable_code, clippy::all)]
                if false {
                    let never: #output = loop {};
                    return never;
                }
                #block
            };
            match ::stanchion::LockRequest::run(#request, #body).await {
                ::core::result::Result::Ok(outcome) => outcome,
                ::core::result::Result::Err(#error) => ::core::result::Result::Err(#failed),
            }
        }
    })
}

/// Returns the type that the body returns. It must be a `Result`.
fn result(sig: &Signature) -> Result<Type> {
    let message = "the function must return `Result<T, E>` with `E: From<stanchion::Error>`, because locking can fail";
    let ReturnType::Type(_, output) = &sig.output else {
        return Err(Error::new(sig.paren_token.span.close(), message));
    };
    let is_result = match &**output {
        Type::Path(path) => path.path.segments.last().is_some_and(|last| last.ident.to_string().ends_with("Result")),
        _ => false,
    };
    if !is_result {
        return Err(Error::new_spanned(output, message));
    }
    let mut output = (**output).clone();
    Inferred.visit_type_mut(&mut output);
    Ok(output)
}

/// Replaces `impl Trait` by `_`, because a variable's type can only be inferred there.
struct Inferred;

impl VisitMut for Inferred {
    fn visit_type_mut(&mut self, part: &mut Type) {
        match part {
            Type::ImplTrait(_) => *part = parse_quote!(_),
            _ => visit_mut::visit_type_mut(self, part),
        }
    }
}

/// Returns the names of the arguments, also of those inside patterns.
fn names(sig: &Signature) -> Vec<String> {
    let mut names = Names::default();
    for argument in &sig.inputs {
        match argument {
            FnArg::Receiver(_) => names.0.push("self".to_owned()),
            FnArg::Typed(typed) => names.visit_pat(&typed.pat),
        }
    }
    names.0
}

#[derive(Default)]
struct Names(Vec<String>);

impl<'a> Visit<'a> for Names {
    fn visit_pat(&mut self, pattern: &'a Pat) {
        if let Pat::Ident(variable) = pattern {
            self.0.push(variable.ident.to_string());
        }
        visit::visit_pat(self, pattern);
    }
}

/// Returns the expression of the handle.
fn locks(options: &Options, sig: &Signature, names: &[String]) -> Result<TokenStream> {
    let has = |name: &str| names.iter().any(|argument| argument == name);
    match &options.locks {
        Some(expression) if mentions_self(expression.to_token_stream()) && !has("self") => {
            Err(Error::new_spanned(expression, "this function has no `self` argument"))
        }
        Some(expression) => Ok(quote_spanned!(expression.span()=> (#expression))),
        None if has("locks") => Ok(quote!(locks)),
        None if has("self") => Ok(quote!(self.locks)),
        None => {
            let message = "no handle: add the option `locks = EXPRESSION`, or an argument named `locks`";
            Err(Error::new(sig.ident.span(), message))
        }
    }
}

fn mentions_self(tokens: TokenStream) -> bool {
    tokens.into_iter().any(|token| match token {
        proc_macro2::TokenTree::Ident(name) => name == "self",
        proc_macro2::TokenTree::Group(group) => mentions_self(group.stream()),
        _ => false,
    })
}
