//! The object as the compiler links it, cut down to what is loaded.

use anyhow::{Context as _, Result, bail};
use object::{
    build::elf::{Builder, SectionData},
    elf,
};

/// Removes DWARF; BTF, its line information, relocations and the symbol table stay.
///
/// Done here rather than by an `objcopy`, so that the bytes do not depend on which one is installed.
pub fn without_dwarf(linked: &[u8]) -> Result<Vec<u8>> {
    let mut elf = Builder::read(linked).context("the linker wrote no ELF object")?;
    for section in &mut elf.sections {
        let name = section.name.to_string();
        section.delete = name.starts_with(".debug_") || name.starts_with(".rel.debug_");
    }
    elf.delete_orphans();
    // LLVM keeps the sections' names among the symbols'; the writer wants a table for each.
    if !elf.sections.iter().any(|section| matches!(section.data, SectionData::SectionString)) {
        let names = elf.sections.add();
        names.name = b".shstrtab".as_slice().into();
        names.sh_type = elf::SHT_STRTAB;
        names.sh_addralign = 1;
        names.data = SectionData::SectionString;
    }
    for needed in [".BTF", ".BTF.ext", ".maps", ".symtab", "xdp"] {
        if !elf.sections.iter().any(|section| section.name.as_slice() == needed.as_bytes()) {
            bail!("the linked object has no section {needed}");
        }
    }
    let mut stripped = Vec::new();
    elf.write(&mut stripped).context("cannot write the object without DWARF")?;
    Ok(stripped)
}
