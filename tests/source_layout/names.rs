//! Finds the file that defines a name, through imports and re-exports.

use crate::tree::{Binding, FileId, ModuleId, Tree};

/// The target of a path.
#[derive(Clone, Copy)]
pub enum Target {
    Module(ModuleId),
    Item(FileId),
}

/// Resolves paths within one crate. A path that leads out of the crate resolves to nothing.
pub struct Resolver<'a> {
    tree: &'a Tree,
    /// Searches that are under way: an import may lead back to itself.
    searches: Vec<(ModuleId, Vec<String>)>,
}

impl<'a> Resolver<'a> {
    pub fn new(tree: &'a Tree) -> Self {
        Self { tree, searches: Vec::new() }
    }

    /// Resolves `path` as it is written in `module`.
    pub fn resolve(&mut self, module: ModuleId, path: &[String]) -> Option<Target> {
        let mut at = module;
        let mut rest = path;
        while let Some((first, others)) = rest.split_first() {
            at = match first.as_str() {
                "crate" | "$crate" => self.root(at),
                "self" => at,
                "super" => self.tree.modules[at].parent?,
                _ => break,
            };
            rest = others;
        }
        let is_explicit = rest.len() < path.len();
        if !is_explicit && let Some(target) = self.in_library(module, path) {
            return target;
        }
        self.search(at, rest, is_explicit)
    }

    fn root(&self, mut module: ModuleId) -> ModuleId {
        while let Some(parent) = self.tree.modules[module].parent {
            module = parent;
        }
        module
    }

    /// The program's path into the library of its own package.
    fn in_library(&mut self, module: ModuleId, path: &[String]) -> Option<Option<Target>> {
        let (name, library) = self.tree.library.as_ref()?;
        let into = path.first() == Some(name) && self.root(module) != *library;
        into.then(|| self.search(*library, &path[1..], true))
    }

    fn search(&mut self, module: ModuleId, path: &[String], is_explicit: bool) -> Option<Target> {
        let Some((name, rest)) = path.split_first() else { return Some(Target::Module(module)) };
        let search = (module, path.to_vec());
        if self.searches.contains(&search) {
            return None;
        }
        self.searches.push(search);
        let found = self.search_names(module, name, rest, is_explicit);
        self.searches.pop();
        found
    }

    fn search_names(
        &mut self,
        module: ModuleId,
        name: &str,
        rest: &[String],
        is_explicit: bool,
    ) -> Option<Target> {
        let tree = self.tree;
        let mut found = None;
        let bindings = tree.modules[module].names.get(name);
        for binding in bindings.into_iter().flatten() {
            let target = match binding {
                Binding::Item => Some(Target::Item(tree.modules[module].file)),
                Binding::Module(child) => self.search(*child, rest, true),
                Binding::Import(path) => match self.resolve(module, path) {
                    Some(Target::Module(other)) => self.search(other, rest, true),
                    target => target,
                },
            };
            match target {
                Some(Target::Item(_)) => return target,
                target => found = found.or(target),
            }
        }
        if bindings.is_some() {
            return found;
        }
        let path: Vec<String> = std::iter::once(name.to_owned()).chain(rest.iter().cloned()).collect();
        for glob in &tree.modules[module].globs {
            if let Some(Target::Module(other)) = self.resolve(module, glob)
                && let Some(target) = self.search(other, &path, false)
            {
                return Some(target);
            }
        }
        // A macro made it.
        is_explicit.then_some(Target::Item(tree.modules[module].file))
    }
}
