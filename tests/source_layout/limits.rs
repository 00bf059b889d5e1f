//! Limits of size and shape: lines of a file, lines of a function, results within results.

use syn::spanned::Spanned;
use syn::visit::{self, Visit};
use syn::{
    Attribute, Block, GenericArgument, ImplItemFn, Item, ItemFn, ItemMod, Path, PathArguments, Signature,
    TraitItemFn, Type,
};

use crate::tree::{File, attributes, is_test_only};

/// Most lines of a file, without its modules of tests.
pub const FILE_LINES: usize = 350;
/// Most lines of a function, from its signature to its end.
pub const FUNCTION_LINES: usize = 60;

/// Describes what the file has beyond the limits.
pub fn violations(file: &File) -> Vec<String> {
    let mut tests = vec![false; file.text.lines().count() + 2];
    let mut functions = Functions { file, found: Vec::new() };
    for item in &file.items {
        functions.visit_item(item);
        if matches!(item, Item::Mod(_)) && attributes(item).iter().any(is_test_only) {
            let first = attributes(item).first().map_or(item.span(), Spanned::span).start().line;
            tests[first..=item.span().end().line].fill(true);
        }
    }
    let mut found = functions.found;
    let lines = (1..).zip(file.text.lines()).filter(|(line, _)| !tests[*line]).count();
    if lines > FILE_LINES {
        found.push(format!("{}: {lines} lines without tests, {FILE_LINES} allowed", file.shown));
    }
    found
}

struct Functions<'a> {
    file: &'a File,
    found: Vec<String>,
}

impl Functions<'_> {
    fn measure(&mut self, attributes: &[Attribute], signature: &Signature, block: &Block) -> bool {
        if attributes.iter().any(is_test_only) {
            return false;
        }
        let first = signature.span().start().line;
        let lines = block.span().end().line - first + 1;
        if lines > FUNCTION_LINES {
            let name = &signature.ident;
            self.found.push(format!(
                "{}:{first}: fn {name} has {lines} lines, {FUNCTION_LINES} allowed",
                self.file.shown
            ));
        }
        true
    }
}

impl<'a> Visit<'a> for Functions<'_> {
    fn visit_item_mod(&mut self, item: &'a ItemMod) {
        if !item.attrs.iter().any(is_test_only) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_fn(&mut self, item: &'a ItemFn) {
        if self.measure(&item.attrs, &item.sig, &item.block) {
            visit::visit_item_fn(self, item);
        }
    }

    fn visit_impl_item_fn(&mut self, item: &'a ImplItemFn) {
        if self.measure(&item.attrs, &item.sig, &item.block) {
            visit::visit_impl_item_fn(self, item);
        }
    }

    fn visit_trait_item_fn(&mut self, item: &'a TraitItemFn) {
        if let Some(block) = &item.default
            && self.measure(&item.attrs, &item.sig, block)
        {
            visit::visit_trait_item_fn(self, item);
        }
    }

    fn visit_path(&mut self, path: &'a Path) {
        if within_result(path).any(|within| matches!(within, Type::Path(within) if is_result(&within.path))) {
            let line = path.span().start().line;
            self.found.push(format!("{}:{line}: a Result within a Result", self.file.shown));
        }
        visit::visit_path(self, path);
    }
}

fn is_result(path: &Path) -> bool {
    path.segments.last().is_some_and(|segment| segment.ident == "Result")
}

/// Returns the types within the `Result` of that path, which may be qualified: `std::io::Result<T>`.
fn within_result(path: &Path) -> impl Iterator<Item = &Type> {
    let arguments = path.segments.last().filter(|_| is_result(path)).map(|segment| &segment.arguments);
    let types = arguments.and_then(|arguments| match arguments {
        PathArguments::AngleBracketed(arguments) => Some(&arguments.args),
        _ => None,
    });
    types.into_iter().flatten().filter_map(|argument| match argument {
        GenericArgument::Type(within) => Some(within),
        _ => None,
    })
}
