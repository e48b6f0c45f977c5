// Arrays and numbers of a program that is started as PROGRAM FOLDER name=number...: FOLDER/<array>.bin.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

inline std::string folder;
inline std::map<std::string, long long> numbers;

inline long long number(const char* name) {
  if (!numbers.contains(name)) std::fprintf(stderr, "no %s\n", name), std::exit(2);
  return numbers.at(name);
}

template <class T>
std::vector<T> read(const std::string& name) {
  std::FILE* file = std::fopen((folder + "/" + name + ".bin").c_str(), "rb");
  if (!file) return {};
  std::fseek(file, 0, SEEK_END);
  std::vector<T> found(static_cast<size_t>(std::ftell(file)) / sizeof(T));
  std::rewind(file);
  if (!found.empty() && std::fread(found.data(), sizeof(T), found.size(), file) != found.size()) std::exit(3);
  std::fclose(file);
  return found;
}

template <class T>
void write(const std::string& name, const std::vector<T>& values) {
  std::FILE* file = std::fopen((folder + "/" + name + ".bin").c_str(), "wb");
  if (!file) std::exit(4);
  if (!values.empty() && std::fwrite(values.data(), sizeof(T), values.size(), file) != values.size()) std::exit(4);
  std::fclose(file);
}

inline bool read_arguments(int argc, char** argv) {
  if (argc < 3) return false;
  folder = argv[1];
  for (int i = 2; i < argc; ++i) {
    const std::string text = argv[i];
    const size_t equals = text.find('=');
    numbers[text.substr(0, equals)] = std::stoll(text.substr(equals + 1));
  }
  return true;
}
