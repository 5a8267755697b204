// Finds what has a name among others of its kind.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

namespace edgeexport {

// Null where there is none.
template <typename Element>
const Element* named(const std::vector<Element>& elements, const std::string& name) {
  const auto found = std::find_if(elements.begin(), elements.end(), [&](auto& each) { return each.name == name; });
  return found == elements.end() ? nullptr : &*found;
}

}  // namespace edgeexport
