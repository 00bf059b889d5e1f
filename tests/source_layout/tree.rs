//! The module tree of a crate, read from its source files without the code of tests.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};
use syn::{Attribute, Expr, Item, ItemMod, ItemUse, Lit, Meta, UseTree};

/// Number of a file in [`Tree::files`].
pub type FileId = usize;
/// Number of a module in [`Tree::modules`].
pub type ModuleId = usize;

/// A crate's folder with the files of its library and its program.
pub struct Tree {
    pub files: Vec<File>,
    pub modules: Vec<Module>,
    /// The library's name in paths, and its root module.
    pub library: Option<(String, ModuleId)>,
}

/// A source file.
pub struct File {
    /// The path, as messages show it.
    pub shown: String,
    /// The module's path below the crate, as the list of floors has it: `lib`, `main`, `fleet/pool`.
    pub name: String,
    pub text: String,
    pub items: Vec<Item>,
    pub module: ModuleId,
}

/// A module, with a file of its own or inline.
#[derive(Default)]
pub struct Module {
    pub file: FileId,
    pub parent: Option<ModuleId>,
    pub names: BTreeMap<String, Vec<Binding>>,
    pub globs: Vec<Vec<String>>,
}

/// A meaning of a name in a module.
#[derive(Clone)]
pub enum Binding {
    Module(ModuleId),
    Item,
    Import(Vec<String>),
}

/// One path of a `use` declaration.
pub struct Import {
    pub path: Vec<String>,
    /// The name in the importing module; `None` for `*`.
    pub name: Option<String>,
    pub line: usize,
}

impl Tree {
    /// Reads the crate in `folder`, a path below `root`.
    pub fn read(root: &Path, folder: &str) -> Result<Self, String> {
        let mut tree = Self { files: Vec::new(), modules: Vec::new(), library: None };
        let source = root.join(folder).join("src");
        for name in ["lib", "main"] {
            let file = source.join(name).with_extension("rs");
            if file.is_file() {
                let module = tree.add_module(None);
                if name == "lib" {
                    let package = folder.rsplit('/').next().unwrap_or(folder);
                    tree.library = Some((package.replace('-', "_"), module));
                }
                tree.add_file(root, &file, name, module)?;
            }
        }
        Ok(tree)
    }

    fn add_module(&mut self, parent: Option<ModuleId>) -> ModuleId {
        let file = parent.map_or(0, |parent| self.modules[parent].file);
        self.modules.push(Module { file, parent, ..Module::default() });
        self.modules.len() - 1
    }

    fn add_file(&mut self, root: &Path, path: &Path, name: &str, module: ModuleId) -> Result<(), String> {
        let shown = path.strip_prefix(root).unwrap_or(path).display().to_string();
        let text = fs::read_to_string(path).map_err(|error| format!("cannot read {shown}: {error}"))?;
        let parsed = syn::parse_file(&text).map_err(|error| format!("cannot parse {shown}: {error}"))?;
        let file = self.files.len();
        self.modules[module].file = file;
        let is_test = parsed.attrs.iter().any(is_test_only);
        let items = if is_test { Vec::new() } else { parsed.items };
        self.files.push(File { shown, name: name.to_owned(), text, items: items.clone(), module });
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        let parent = path.parent().unwrap_or(root);
        let is_root = matches!(stem, "lib" | "main") && self.modules[module].parent.is_none();
        let below = if is_root || stem == "mod" { parent.to_owned() } else { parent.join(stem) };
        let prefix = if is_root { "" } else { name };
        self.add_items(&Place { root, folder: parent, below, prefix: prefix.to_owned() }, &items, module)
    }

    fn add_items(&mut self, place: &Place<'_>, items: &[Item], module: ModuleId) -> Result<(), String> {
        for item in items.iter().filter(|item| !attributes(item).iter().any(is_test_only)) {
            for import in imports_within(item) {
                match import.name {
                    Some(name) => self.bind(module, name, Binding::Import(import.path)),
                    None => self.modules[module].globs.push(import.path),
                }
            }
            match item {
                Item::Mod(child) => self.add_child(place, child, module)?,
                item => {
                    if let Some(name) = item_name(item) {
                        self.bind(module, name, Binding::Item);
                    }
                }
            }
        }
        Ok(())
    }

    fn add_child(&mut self, place: &Place<'_>, child: &ItemMod, module: ModuleId) -> Result<(), String> {
        let name = child.ident.to_string();
        let id = self.add_module(Some(module));
        self.bind(module, name.clone(), Binding::Module(id));
        let full = if place.prefix.is_empty() { name.clone() } else { format!("{}/{name}", place.prefix) };
        if let Some((_, items)) = &child.content {
            let below = place.below.join(&name);
            return self.add_items(&Place { below, prefix: full, ..*place }, items, id);
        }
        let chosen = path_attribute(&child.attrs).map(|path| place.folder.join(path));
        let usual = [place.below.join(format!("{name}.rs")), place.below.join(&name).join("mod.rs")];
        let file = chosen.into_iter().chain(usual).find(|file| file.is_file());
        let missing = || format!("no file of module {full} below {}", place.below.display());
        self.add_file(place.root, &file.ok_or_else(missing)?, &full, id)
    }

    fn bind(&mut self, module: ModuleId, name: String, binding: Binding) {
        self.modules[module].names.entry(name).or_default().push(binding);
    }
}

/// Where the files of child modules are.
struct Place<'a> {
    root: &'a Path,
    folder: &'a Path,
    below: PathBuf,
    prefix: String,
}

/// Returns whether the attribute keeps its item out of everything but tests.
pub fn is_test_only(attribute: &Attribute) -> bool {
    let Meta::List(list) = &attribute.meta else { return attribute.path().is_ident("test") };
    let tokens = list.tokens.to_string();
    let mut words = tokens.split(|letter: char| !letter.is_alphanumeric() && letter != '_');
    list.path.is_ident("cfg") && words.clone().any(|word| word == "test") && words.all(|word| word != "not")
}

fn path_attribute(attributes: &[Attribute]) -> Option<String> {
    attributes.iter().find_map(|attribute| match &attribute.meta {
        Meta::NameValue(pair) if pair.path.is_ident("path") => match &pair.value {
            Expr::Lit(literal) => match &literal.lit {
                Lit::Str(text) => Some(text.value()),
                _ => None,
            },
            _ => None,
        },
        _ => None,
    })
}

/// Returns the item's attributes.
pub fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::ExternCrate(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::ForeignMod(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::TraitAlias(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Union(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

fn item_name(item: &Item) -> Option<String> {
    let name = match item {
        Item::Const(item) => &item.ident,
        Item::Enum(item) => &item.ident,
        Item::Fn(item) => &item.sig.ident,
        Item::Macro(item) => item.ident.as_ref()?,
        Item::Static(item) => &item.ident,
        Item::Struct(item) => &item.ident,
        Item::Trait(item) => &item.ident,
        Item::Type(item) => &item.ident,
        Item::Union(item) => &item.ident,
        _ => return None,
    };
    Some(name.to_string())
}

/// Returns the imports of an item, those inside function bodies too, and none of an inline module.
fn imports_within(item: &Item) -> Vec<Import> {
    struct Collector(Vec<Import>);
    impl<'a> Visit<'a> for Collector {
        fn visit_item_mod(&mut self, _: &'a ItemMod) {}
        fn visit_item(&mut self, item: &'a Item) {
            if !attributes(item).iter().any(is_test_only) {
                visit::visit_item(self, item);
            }
        }
        fn visit_item_use(&mut self, item: &'a ItemUse) {
            self.0.extend(imports(item));
        }
    }
    let mut collector = Collector(Vec::new());
    collector.visit_item(item);
    collector.0
}

/// Returns the paths of a `use` declaration.
pub fn imports(item: &ItemUse) -> Vec<Import> {
    let mut imports = Vec::new();
    if item.leading_colon.is_none() {
        flatten(&item.tree, &[], &mut imports);
    }
    imports
}

fn flatten(tree: &UseTree, prefix: &[String], into: &mut Vec<Import>) {
    let mut add = |ident: Option<&syn::Ident>, name: Option<String>, line| {
        let mut path = prefix.to_vec();
        path.extend(ident.filter(|ident| *ident != "self" || prefix.is_empty()).map(ToString::to_string));
        let name = name.map(|name| if name == "self" { path.last().cloned().unwrap_or(name) } else { name });
        into.push(Import { path, name, line });
    };
    match tree {
        UseTree::Path(path) => {
            let mut longer = prefix.to_vec();
            longer.push(path.ident.to_string());
            flatten(&path.tree, &longer, into);
        }
        UseTree::Name(name) => {
            add(Some(&name.ident), Some(name.ident.to_string()), name.ident.span().start().line);
        }
        UseTree::Rename(name) => {
            add(Some(&name.ident), Some(name.rename.to_string()), name.ident.span().start().line);
        }
        UseTree::Glob(glob) => add(None, None, glob.star_token.spans[0].start().line),
        UseTree::Group(group) => group.items.iter().for_each(|tree| flatten(tree, prefix, into)),
        #[allow(unreachable_patterns)]
        _ => {}
    }
}
