//! The edges between files: one file names an item that another file defines.

use std::collections::BTreeSet;

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{Attribute, ImplItem, Item, ItemMacro, ItemMod, ItemUse, Macro, Meta, Path, VisRestricted};

use crate::names::{Resolver, Target};
use crate::tree::{Binding, FileId, ModuleId, Tree, attributes, imports, is_test_only};

/// A use of another file's item.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Edge {
    pub from: FileId,
    pub to: FileId,
    pub line: usize,
    pub path: String,
}

/// Returns the edges of all files, in their order.
pub fn edges(tree: &Tree) -> BTreeSet<Edge> {
    let mut visitor =
        Visitor { tree, resolver: Resolver::new(tree), file: 0, module: 0, edges: BTreeSet::new() };
    for (number, file) in tree.files.iter().enumerate() {
        visitor.file = number;
        visitor.module = file.module;
        file.items.iter().for_each(|item| visitor.visit_item(item));
    }
    visitor.edges
}

struct Visitor<'a> {
    tree: &'a Tree,
    resolver: Resolver<'a>,
    file: FileId,
    module: ModuleId,
    edges: BTreeSet<Edge>,
}

impl Visitor<'_> {
    fn add(&mut self, path: &[String], line: usize) {
        let Some(Target::Item(to)) = self.resolver.resolve(self.module, path) else { return };
        if to != self.file {
            self.edges.insert(Edge { from: self.file, to, line, path: path.join("::") });
        }
    }

    /// Finds paths in the tokens of a macro, which may be no syntax of Rust.
    fn scan(&mut self, tokens: TokenStream) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let mut at = 0;
        while at < tokens.len() {
            match &tokens[at] {
                TokenTree::Group(group) => self.scan(group.stream()),
                TokenTree::Ident(first) => {
                    let is_member = at > 0 && is_dot(&tokens[at - 1]) && (at < 2 || !is_dot(&tokens[at - 2]));
                    let mut path = vec![first.to_string()];
                    while let Some(next) = next_segment(&tokens[at + 1..]) {
                        path.push(next);
                        at += 3;
                    }
                    if !is_member {
                        self.add(&path, first.span().start().line);
                    }
                }
                _ => {}
            }
            at += 1;
        }
    }
}

fn is_dot(token: &TokenTree) -> bool {
    matches!(token, TokenTree::Punct(punct) if punct.as_char() == '.')
}

fn next_segment(tokens: &[TokenTree]) -> Option<String> {
    let is_colon = |token: &TokenTree| matches!(token, TokenTree::Punct(punct) if punct.as_char() == ':');
    match tokens {
        [one, two, TokenTree::Ident(name), ..] if is_colon(one) && is_colon(two) => Some(name.to_string()),
        _ => None,
    }
}

impl<'a> Visit<'a> for Visitor<'_> {
    fn visit_item(&mut self, item: &'a Item) {
        if !attributes(item).iter().any(is_test_only) {
            visit::visit_item(self, item);
        }
    }

    fn visit_impl_item(&mut self, item: &'a ImplItem) {
        let is_test = matches!(item, ImplItem::Fn(item) if item.attrs.iter().any(is_test_only));
        if !is_test {
            visit::visit_impl_item(self, item);
        }
    }

    fn visit_item_mod(&mut self, item: &'a ItemMod) {
        let Some((_, items)) = &item.content else { return };
        let outer = self.module;
        let bindings = self.tree.modules[outer].names.get(&item.ident.to_string());
        let child = bindings.into_iter().flatten().find_map(|binding| match binding {
            Binding::Module(child) => Some(*child),
            _ => None,
        });
        self.module = child.unwrap_or(outer);
        items.iter().for_each(|item| self.visit_item(item));
        self.module = outer;
    }

    fn visit_item_use(&mut self, item: &'a ItemUse) {
        for import in imports(item) {
            self.add(&import.path, import.line);
        }
    }

    fn visit_path(&mut self, path: &'a Path) {
        if path.leading_colon.is_none() {
            let names: Vec<String> = path.segments.iter().map(|part| part.ident.to_string()).collect();
            let line = path.segments.first().map_or(0, |part| part.ident.span().start().line);
            self.add(&names, line);
        }
        visit::visit_path(self, path);
    }

    /// Skips the rules of a macro: they expand where the macro is used.
    fn visit_item_macro(&mut self, item: &'a ItemMacro) {
        if item.ident.is_none() {
            visit::visit_item_macro(self, item);
        }
    }

    fn visit_macro(&mut self, item: &'a Macro) {
        self.visit_path(&item.path);
        self.scan(item.tokens.clone());
    }

    fn visit_attribute(&mut self, attribute: &'a Attribute) {
        if let Meta::List(list) = &attribute.meta {
            self.scan(list.tokens.clone());
        }
    }

    fn visit_vis_restricted(&mut self, _: &'a VisRestricted) {}
}
